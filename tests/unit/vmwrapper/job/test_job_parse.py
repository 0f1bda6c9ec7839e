"""vmwrapper.job.parse: what a job file may say, what is refused, and how the refusal reads."""

from __future__ import annotations

import io
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmcontrol.protocol.vm import PortForward, VmSettings
from vmwrapper.errors import BadInput
from vmwrapper.exit_status import ExitStatus
from vmwrapper.job import elements, guestfields
from vmwrapper.job import parse as job_parse
from vmwrapper.job.complaints import WARNINGS_LIMIT, Complaints
from vmwrapper.job.model import NCPUS, GuestOptions, HostOptions, Job, Priority, Task, ZipOutput

PAGE_EXAMPLE = """\
<job_desc>
    <unzip_task>
        <application>tar</application>
        <command_line>-xf ./cctools-2_5_2-i686-linux-2.6.tar</command_line>
        <stdout_filename>stdout_tar</stdout_filename>
        <stderr_filename>stderr_tar</stderr_filename>
    </unzip_task>
    <unzip_task>
        <application>tar</application>
        <command_line>-xf ./apache-activemq-5.2.0.tar</command_line>
        <stdout_filename>stdout_tar</stdout_filename>
        <stderr_filename>stderr_tar</stderr_filename>
    </unzip_task>
    <unzip_task>
        <application>tar</application>
        <command_line>-xf ./boincvm.tar</command_line>
    </unzip_task>
    <VMmanage_task>
        <application>./apache-activemq-5.2.0/bin/activemq</application>
        <stdin_filename></stdin_filename>
        <stdout_filename>stdout_broker</stdout_filename>
        <stderr_filename>stderr_broker</stderr_filename>
        <command_line></command_line>
    </VMmanage_task>
    <VMmanage_task>
        <application>python</application>
        <stdin_filename></stdin_filename>
        <stdout_filename>stdout_HostMain</stdout_filename>
        <stderr_filename>stderr_HostMain</stderr_filename>
        <command_line>./boincvm/HostMain.py ./boincvm/HostConfig.cfg</command_line>
    </VMmanage_task>
    <task>
        <virtualmachine>CernVM</virtualmachine>
        <image></image>
        <app_pathVM></app_pathVM>
        <application>./worker.py</application>
        <copy_app_to_VM>1</copy_app_to_VM>
        <copy_file_to_VM>in</copy_file_to_VM>
        <copy_file_to_VM>stdin_worker</copy_file_to_VM>
        <stdin_filename>stdin_worker</stdin_filename>
        <stdout_filename>stdout_worker</stdout_filename>
        <stderr_filename>stderr_worker</stderr_filename>
        <copy_file_from_VM>out</copy_file_from_VM>
        <command_line>5</command_line>
        <weight>2</weight>
    </task>
</job_desc>
"""
HOST_MAIN = "<VMmanage_task><application>HostMain</application><command_line>H.cfg</command_line></VMmanage_task>"


def parse(text: str | bytes) -> Job:
    return job_parse.parse(text.encode() if isinstance(text, str) else text, "job.xml")


def parse_host_task(inside: str) -> Task:
    (task,) = parse(f"<job_desc><task><application>a</application>{inside}</task></job_desc>").tasks
    return task


def guest_task(inside: str, vm: str = "VM", more: str = "") -> str:
    return (
        f"<job_desc>{HOST_MAIN}<task><virtualmachine>{vm}</virtualmachine><application>app</application>{inside}"
        f"</task>{more}</job_desc>"
    )


def parse_guest(inside: str) -> GuestOptions:
    (task,) = parse(guest_task(inside)).tasks
    assert task.guest is not None
    return task.guest


def errors_of(text: str | bytes) -> list[str]:
    findings = job_parse.examine(text.encode() if isinstance(text, str) else text, "job.xml")
    return [str(error) for error in findings.errors]


def warnings_of(text: str | bytes) -> list[str]:
    findings = job_parse.examine(text.encode() if isinstance(text, str) else text, "job.xml")
    assert findings.job is not None, findings.errors
    assert findings.job.warnings == findings.warnings
    return [str(warning) for warning in findings.warnings]


class TestThePage:
    def test_its_example_is_accepted_as_it_stands(self) -> None:
        job = parse(PAGE_EXAMPLE)
        assert job.warnings == ()
        assert [task.command_line for task in job.unzip_tasks] == [
            "-xf ./cctools-2_5_2-i686-linux-2.6.tar",
            "-xf ./apache-activemq-5.2.0.tar",
            "-xf ./boincvm.tar",
        ]
        assert [(task.application, task.is_host_main) for task in job.vmmanage_tasks] == [
            ("./apache-activemq-5.2.0/bin/activemq", False),
            ("python", True),
        ]
        assert job.tasks == (
            Task(
                application="./worker.py",
                line=32,
                command_line="5",
                stdin_filename="stdin_worker",
                stdout_filename="stdout_worker",
                stderr_filename="stderr_worker",
                weight=2.0,
                guest=GuestOptions(
                    virtualmachine="CernVM",
                    copy_app_to_vm=True,
                    copy_files_to_vm=("in", "stdin_worker"),
                    copy_files_from_vm=("out",),
                ),
            ),
        )

    def test_stdout_may_be_listed_among_the_files_to_copy_back(self) -> None:
        guest = parse_guest("<stdout_filename>o</stdout_filename>" + "<copy_file_from_VM>./o</copy_file_from_VM>" * 2)
        assert guest.copy_files_from_vm == ()

    def test_empty_elements_are_absent(self) -> None:
        names = "image app_pathVM copy_app_to_VM copy_file_to_VM stdin_filename copy_file_from_VM weight cpus os_name"
        assert parse_guest("".join(f"<{name}></{name}>" for name in names.split())) == GuestOptions("VM")

    def test_a_task_without_a_virtual_machine_is_a_host_task(self) -> None:
        task = parse_host_task("<virtualmachine> </virtualmachine><image></image><command_line>x y</command_line>")
        assert task.guest is None
        assert task.command_line == "x y"


class TestValues:
    @pytest.mark.parametrize(
        ("element", "expected"),
        [
            ("<copy_app_to_VM/>", True),
            ("<copy_app_to_VM />", True),
            ("<copy_app_to_VM></copy_app_to_VM>", False),
            ("<copy_app_to_VM>1</copy_app_to_VM>", True),
            ("<copy_app_to_VM> -3 </copy_app_to_VM>", True),
            ("<copy_app_to_VM>0x10</copy_app_to_VM>", True),
            ("<copy_app_to_VM>0</copy_app_to_VM>", False),
            ("<copy_app_to_VM>000</copy_app_to_VM>", False),
            ("<copy_app_to_VM>0x00</copy_app_to_VM>", False),
            ("<!-- <copy_app_to_VM/> -->", False),
            ("", False),
        ],
    )
    def test_booleans_are_boincs(self, element: str, expected: bool) -> None:
        assert parse_guest(element).copy_app_to_vm is expected

    def test_guest_elements(self) -> None:
        guest = parse_guest(
            "<image>guest.vdi</image><hypervisor>QEMU</hypervisor><os_name>Debian_64</os_name>"
            "<memory_size_mb>1024</memory_size_mb><cpus>2</cpus><enable_network/><network_mode>hostonly</network_mode>"
            "<port_forward><guest_port>80</guest_port><host_port>8080</host_port><is_remote/></port_forward>"
            "<port_forward><guest_port>22</guest_port></port_forward><enable_remotedesktop>1</enable_remotedesktop>"
            "<job_duration>3600</job_duration><minimum_checkpoint_interval>0</minimum_checkpoint_interval>"
            "<disable_automatic_checkpoints/><boot_timeout>90.5</boot_timeout><app_pathVM>/opt/app</app_pathVM>"
            "<cpu_time_source>command</cpu_time_source><trickle_trigger_file>t1</trickle_trigger_file>"
            "<trickle_trigger_file>t2</trickle_trigger_file>"
        )
        assert guest == GuestOptions(
            "VM",
            image="guest.vdi",
            hypervisor="qemu",
            settings=VmSettings(
                os_type="Debian_64",
                memory_mb=1024,
                cpus=2,
                network=True,
                network_mode="hostonly",
                port_forwards=(PortForward(80, 8080, True), PortForward(22)),
                remote_desktop=True,
            ),
            job_duration_s=3600.0,
            minimum_checkpoint_interval_s=0.0,
            disable_automatic_checkpoints=True,
            boot_timeout_s=90.5,
            app_path_vm="/opt/app",
            cpu_time_source="command",
            trickle_trigger_files=("t1", "t2"),
        )

    def test_cpus_may_be_those_of_the_client(self) -> None:
        assert parse_guest("<cpus>ncpus</cpus>").settings.cpus == NCPUS

    def test_task_elements(self) -> None:
        task = parse_host_task(
            "<weight>0.5</weight><checkpoint_filename>cp</checkpoint_filename><time_limit>60</time_limit>"
            "<fraction_done_filename>fd</fraction_done_filename><setenv>A=b=c</setenv><setenv>E=</setenv>"
            "<append_cmdline_args/><priority>2</priority><multi_process>1</multi_process><daemon>0</daemon>"
            "<exec_dir>d</exec_dir><forward_slashes/>"
        )
        assert task.host == HostOptions("d", True, True, True, Priority.LOW)
        assert parse_host_task("<weight>0</weight>").weight == 0
        assert (task.weight, task.checkpoint_filename, task.fraction_done_filename) == (0.5, "cp", "fd")
        assert task.time_limit_s == 60.0
        assert task.setenv == ("A=b=c", "E=")
        assert parse_host_task("<time_limit>0</time_limit>").time_limit_s is None

    def test_job_elements(self) -> None:
        job = parse(
            "<job_desc><trickle_up_period>900</trickle_up_period><intermediate_upload_file>a</intermediate_upload_file>"
            "<intermediate_upload_file>b</intermediate_upload_file><enable_graphics_support/></job_desc>"
        )
        assert (job.trickle_up_period_s, job.intermediate_upload_files) == (900.0, ("a", "b"))
        assert job.warnings[0].text.startswith("has no <task>")

    @pytest.mark.parametrize(
        ("inside", "field", "value"),
        [
            ("<weight>1,5</weight>", "weight", 1.0),
            ("<weight>1.0f</weight>", "weight", 1.0),
            ("<weight>-0.1</weight>", "weight", 1.0),
            ("<weight>nan</weight>", "weight", 1.0),
            ("<weight>inf</weight>", "weight", 1.0),
            ("<weight>1e999</weight>", "weight", 1.0),
            ("<weight>1_0</weight>", "weight", 1.0),
            ("<weight>١</weight>", "weight", 1.0),
            ("<weight/>", "weight", 1.0),
            ("<weight></weight>", "weight", 0.0),
            ("<weight>2</weight><weight>1,5</weight>", "weight", 2.0),
            ("<weight><x/></weight>", "weight", 1.0),
            ("<time_limit>3600s</time_limit>", "time_limit_s", None),
            ("<time_limit>-1</time_limit>", "time_limit_s", None),
            ("<time_limit>inf</time_limit>", "time_limit_s", None),
            ("<time_limit></time_limit>", "time_limit_s", None),
            ("<setenv>NOVALUE</setenv>", "setenv", ("NOVALUE",)),
            ("<setenv>=x</setenv>", "setenv", ("=x",)),
            ("<setenv></setenv>", "setenv", ("",)),
            ("<stdin_filename>a\nb</stdin_filename>", "stdin_filename", "a\nb"),
            ("<priority>9</priority>", "host", HostOptions(priority=Priority.UNSPECIFIED)),
            ("<priority></priority>", "host", HostOptions(priority=Priority.UNSPECIFIED)),
            ("<priority>2.0</priority>", "host", HostOptions()),
            ("<priority>low</priority>", "host", HostOptions()),
            ("<exec_dir>a\nb</exec_dir>", "host", HostOptions("a\nb")),
            ("<multi_process>true</multi_process>", "host", HostOptions()),
            ("<append_cmdline_args>yes</append_cmdline_args>", "host", HostOptions()),
            ("<append_cmdline_args>0x</append_cmdline_args>", "host", HostOptions()),
            ("<append_cmdline_args>08</append_cmdline_args>", "host", HostOptions()),
            ("<command_line>a<x>b</x>c</command_line>", "command_line", ""),
            ("<command_line>a<!-- no --> b</command_line>", "command_line", ""),
            ("<command_line>a <![CDATA[b]]></command_line>", "command_line", ""),
            ("<command_line>a<stdout_filename>b</stdout_filename></command_line>", "stdout_filename", ""),
            ("<command_line><x><stdout_filename>b</stdout_filename></x></command_line>", "stdout_filename", "b"),
            ("<command_line>1</command_line><command_line/>", "command_line", ""),
            ("<command_line>1</command_line><command_line>2<x/></command_line>", "command_line", "1"),
            ("<x><command_line>1</command_line></x>", "command_line", "1"),
            ("<stdout_filename>a</stdout>", "stdout_filename", ""),
            ("<command_line>a &nbsp; & b</command_line>", "command_line", "a &nbsp; & b"),
            (f"<exec_dir>{'n' * 256}</exec_dir>", "host", HostOptions("n" * 256)),
        ],
    )
    def test_what_boincs_wrapper_ignores_is_ignored_with_its_line(self, inside: str, field: str, value: object) -> None:
        text = f"<job_desc>\n<task>\n<application>a</application>\n{inside}</task></job_desc>"
        (task,) = parse(text).tasks
        assert getattr(task, field) == value
        warnings = warnings_of(text)
        assert all(warning.startswith("job.xml:4: <") for warning in warnings)
        assert 1 <= len(warnings) <= 3

    @pytest.mark.parametrize(
        ("inside", "field", "value"),
        [
            ("<weight>0x2</weight>", "weight", 2.0),
            ("<weight>+1e2</weight>", "weight", 100.0),
            ("<weight> .5 </weight>", "weight", 0.5),
            ("<priority>010</priority><priority>0x4</priority>", "host", HostOptions(priority=Priority.HIGH)),
            ("<multi_process>-1</multi_process>", "host", HostOptions(multi_process=True)),
            ("<multi_process></multi_process>", "host", HostOptions()),
            ("<multi_process />", "host", HostOptions(multi_process=True)),
            ("<command_line><!-- c -->a b<!-- c --></command_line>", "command_line", "a b"),
            ("<command_line><![CDATA[ a <b> &amp; ]]></command_line>", "command_line", "a <b> &amp;"),
            ("<command_line>&lt;&#65;&amp;lt; &#xA;x</command_line>", "command_line", "<A&lt; \nx"),
            ("<command_line\n>a</command_line >", "command_line", "a"),
            ("<setenv>A=1</setenv><setenv>A=2</setenv>", "setenv", ("A=1", "A=2")),
        ],
    )
    def test_what_boincs_wrapper_understands(self, inside: str, field: str, value: object) -> None:
        (task,) = parse(f"<job_desc><task><application>a</application>{inside}</task></job_desc>").tasks
        assert getattr(task, field) == value

    def test_an_open_macro_is_an_error(self) -> None:
        text = "<task><application>a</application>\n<command_line>x boinc_resolve(in</command_line></task>"
        assert errors_of(f"<job_desc>{text}</job_desc>") == [
            "job.xml:2: <command_line>: expected 'boinc_resolve(' with its ')'"
        ]

    @pytest.mark.parametrize(
        ("inside", "words"),
        [
            ("<memory_size_mb>0</memory_size_mb>", "expected a whole number of MiB from 16 to"),
            ("<memory_size_mb>1.5</memory_size_mb>", "not '1.5'"),
            ("<cpus>many</cpus>", "expected ncpus, or a whole number"),
            ("<cpus>0</cpus>", "<cpus>"),
            ("<hypervisor>vmware</hypervisor>", "expected one of auto, virtualbox, qemu"),
            ("<network_mode>bridged</network_mode>", "expected one of nat, hostonly"),
            ("<cpu_time_source>x</cpu_time_source>", "expected one of vm, command"),
            ("<os_name>a b</os_name>", "expected an OS type"),
            ("<boot_timeout>0</boot_timeout>", "expected seconds above 0"),
            ("<port_forward><guest_port>0</guest_port></port_forward>", "<guest_port>: expected a port from 1"),
            ("<port_forward><host_port>1</host_port></port_forward>", "<guest_port>: expected the port of the guest"),
            ("<port_forward><guest_port>4616</guest_port></port_forward>", "the agent's"),
            ("<port_forward><guest_port>1</guest_port></port_forward>" * 2, "expected each guest_port once"),
            ("<copy_file_from_VM>/etc/passwd</copy_file_from_VM>", "expected a relative name"),
            ("<copy_file_from_VM>../x</copy_file_from_VM>", "expected a name without '..'"),
            ("<copy_file_from_VM>a/../../x</copy_file_from_VM>", "expected a name without '..'"),
            ("<copy_file_from_VM>..\\x</copy_file_from_VM>", "expected a relative name"),
            ("<copy_file_from_VM>C:x</copy_file_from_VM>", "expected a relative name"),
            ("<copy_file_from_VM>.</copy_file_from_VM>", "expected the name of a file"),
            ("<copy_file_from_VM>d/</copy_file_from_VM>", "expected the name of a file"),
            (f"<copy_file_from_VM>d/{'é' * 128}</copy_file_from_VM>", "expected a name of at most 255 bytes between"),
            ("<copy_file_from_VM>Init_Data.xml</copy_file_from_VM>", "which the BOINC client or vmwrapper uses"),
            ("<copy_file_from_VM>vm/x</copy_file_from_VM>", "which the BOINC client or vmwrapper uses"),
            ("<stdout_filename>stderr.txt</stdout_filename>", "which the BOINC client or vmwrapper uses"),
            ("<stdout_filename>/dev/null</stdout_filename>", "<stdout_filename>: expected a relative name"),
            ("<copy_file_to_VM>../../x</copy_file_to_VM>", "<copy_file_to_VM>: expected a name without '..'"),
            ("<stdout_filename>a</stdout_filename><stderr_filename>a</stderr_filename>", "another file than stdout"),
        ],
    )
    def test_faults_of_guest_tasks(self, inside: str, words: str) -> None:
        (error,) = errors_of(guest_task("\n" + inside))
        assert error.startswith("job.xml:2: <")
        assert words in error

    def test_a_name_of_as_many_bytes_as_a_folder_takes_is_good(self) -> None:
        name = f"{'n' * 255}/{'é' * 127}"
        options = parse_guest(f"<copy_file_from_VM>{name}</copy_file_from_VM>")
        assert options.copy_files_from_vm == (name,)

    @pytest.mark.parametrize("name", ["..", "a/b", "-x", "a\nb"])
    def test_names_of_virtual_machines(self, name: str) -> None:
        (error,) = errors_of(guest_task("", vm=name))
        assert "<virtualmachine>: expected" in error

    def test_an_application_that_is_not_copied_may_be_anywhere_in_the_guest(self) -> None:
        absolute = guest_task("").replace(">app<", ">/usr/bin/python3<")
        assert parse(absolute).tasks[0].application == "/usr/bin/python3"
        (error,) = errors_of(absolute.replace("</task>", "<copy_app_to_VM/></task>"))
        assert "<application>: expected a relative name" in error


class TestTheWholeJob:
    def test_the_application_is_required(self) -> None:
        (error,) = errors_of("<job_desc>\n<unzip_task>\n<command_line>x</command_line></unzip_task></job_desc>")
        assert error == "job.xml:2: <application>: expected the name of a program"

    def test_guest_tasks_have_a_hostmain_though_none_is_named(self) -> None:
        (host_main,) = parse(guest_task("").replace(HOST_MAIN, "")).vmmanage_tasks
        assert host_main.is_host_main
        assert host_main.command_line == ""

    def test_it_stands_after_the_vmmanage_tasks_that_are_named(self) -> None:
        other = "<VMmanage_task><application>broker</application></VMmanage_task>"
        job = parse(guest_task("").replace(HOST_MAIN, other))
        assert [task.application for task in job.vmmanage_tasks] == ["broker", "HostMain"]

    def test_a_job_without_guest_tasks_has_none(self) -> None:
        assert parse("<job_desc><task><application>a</application></task></job_desc>").vmmanage_tasks == ()

    def test_only_one_hostmain(self) -> None:
        (error,) = errors_of(guest_task("").replace(HOST_MAIN, HOST_MAIN * 2))
        assert "expected one HostMain only" in error

    @pytest.mark.parametrize("command_line", ["", "./boincvm/HostMain.py"])
    def test_hostmain_needs_no_configuration(self, command_line: str) -> None:
        (host_main,) = parse(guest_task("").replace(HOST_MAIN, HOST_MAIN.replace("H.cfg", command_line))).vmmanage_tasks
        assert host_main.is_host_main

    def test_settings_of_a_machine_are_given_once_for_all_its_tasks(self) -> None:
        second = "<task><virtualmachine>VM</virtualmachine><application>b</application></task>"
        job = parse(guest_task("<image>g</image><memory_size_mb>99</memory_size_mb>", more=second))
        assert [(task.guest.image, task.guest.settings.memory_mb) for task in job.tasks if task.guest] == [
            ("g", 99)
        ] * 2

    @pytest.mark.parametrize(
        "setting",
        ["<memory_size_mb>51{}</memory_size_mb>", "<image>i{}</image>", "<cpus>{}</cpus>"],
    )
    def test_settings_that_contradict_each_other(self, setting: str) -> None:
        second = f"\n<task><virtualmachine>VM</virtualmachine><application>b</application>\n{setting.format(2)}</task>"
        (error,) = errors_of(guest_task(setting.format(1), more=second))
        assert error.startswith("job.xml:3: ")
        assert "differs from line 1; expected the same value for all tasks of the virtual machine 'VM'" in error
        assert errors_of(guest_task(setting.format(1), more=second.replace(">VM<", ">other<"))) == []

    def test_one_hypervisor_for_a_job(self) -> None:
        second = (
            "<task><virtualmachine>other</virtualmachine><application>b</application>"
            "<hypervisor>virtualbox</hypervisor></task>"
        )
        (error,) = errors_of(guest_task("<hypervisor>qemu</hypervisor>", more=second))
        assert "all tasks of a job" in error

    def test_unknown_elements_are_warnings_with_a_line_and_a_hint(self) -> None:
        warnings = warnings_of(guest_task("\n<copy_app_to_vm>1</copy_app_to_vm>\n<frobnicate><x/></frobnicate>"))
        ignored = "job.xml:{}: <{}>: is no known element of <task> and is ignored"
        assert warnings == [
            ignored.format(2, "copy_app_to_vm") + " (did you mean <copy_app_to_VM>?)",
            ignored.format(3, "frobnicate"),
            ignored.format(3, "x"),
        ]

    def test_elements_in_the_wrong_kind_of_task_are_warnings(self) -> None:
        assert "has no meaning here" in warnings_of(guest_task("<exec_dir>d</exec_dir>"))[0]
        host = "<job_desc><task><application>a</application><image>i</image></task></job_desc>"
        assert "<image>: has no meaning here" in warnings_of(host)[0]

    def test_of_a_repeated_element_the_last_counts(self) -> None:
        text = "<job_desc><task><application>a</application><application>b</application></task></job_desc>"
        assert parse(text).tasks[0].application == "b"
        assert "stands more than once" in warnings_of(text)[0]

    def test_text_and_attributes_out_of_place_are_warnings(self) -> None:
        text = "<job_desc>oops<task n='1'><application lang='en'>a</application></task></job_desc>"
        joined = "\n".join(warnings_of(text))
        assert "has the text 'oops' between elements" in joined
        assert "<task>: has the unknown attribute 'n'" in joined
        assert "<application>: has the unknown attribute 'lang'" in joined

    def test_archives(self) -> None:
        job = parse(
            "<job_desc><unzip_input><zipfilename>a.zip</zipfilename><zipfilename>b</zipfilename></unzip_input>"
            "<unzip_input><zipfilename>c</zipfilename></unzip_input>"
            "<zip_output><zipfilename>z</zipfilename><filename>.*\\.out$</filename><filename>log</filename></zip_output>"
            "</job_desc>"
        )
        assert job.unzip_inputs == ("a.zip", "b", "c")
        assert job.zip_output == ZipOutput("z", (r".*\.out$", "log"))

    @pytest.mark.parametrize(
        ("inside", "words"),
        [
            ("<unzip_input></unzip_input>", "<unzip_input>: expected a <zipfilename>"),
            ("<zip_output><filename>a</filename></zip_output>", "<zipfilename>: expected the name of the archive"),
            ("<zip_output><zipfilename>z</zipfilename></zip_output>", "<zip_output>: has no <filename>"),
            (
                "<zip_output><filename>a(b</filename><zipfilename>z</zipfilename><filename>c</filename></zip_output>",
                "<filename>: expected a regular expression, not 'a(b': a ( is never closed; it is ignored",
            ),
            ("<zip_output><zipfilename>z</zipfilename><filename/></zip_output>", "is empty, which every name matches"),
        ],
    )
    def test_faults_of_archives(self, inside: str, words: str) -> None:
        (warning, *_) = warnings_of(f"<job_desc>\n{inside}</job_desc>")[1:]
        assert warning.startswith("job.xml:2: <")
        assert words in warning

    def test_a_pattern_that_is_none_is_passed_over_alone(self) -> None:
        job = parse(
            "<job_desc><zip_output><filename>a(b</filename><zipfilename>z</zipfilename><filename>c</filename>"
            "</zip_output></job_desc>"
        )
        assert job.zip_output == ZipOutput("z", ("c",))

    def test_daemons_are_no_tasks(self) -> None:
        job = parse(
            "<job_desc><task><application>a</application><daemon/></task>"
            "<task><application>b</application><daemon>0</daemon></task></job_desc>"
        )
        assert [task.application for task in job.daemons] == ["a"]
        assert [task.application for task in job.tasks] == ["b"]

    def test_the_first_error_is_raised_and_all_are_examined(self) -> None:
        text = guest_task("\n<weight>-1</weight>\n<time_limit>x</time_limit>").replace(
            "<application>app<", "<application><"
        )
        assert len(errors_of(text)) == 3
        with pytest.raises(BadInput, match=r"^job.xml:1: <application>: expected .* \(and 2 more; see") as caught:
            parse(text)
        assert caught.value.status == ExitStatus.INIT_FAILURE

    def test_the_digest_is_that_of_the_bytes(self) -> None:
        assert parse(PAGE_EXAMPLE).digest != parse(PAGE_EXAMPLE + " ").digest
        assert parse(PAGE_EXAMPLE).digest == parse(PAGE_EXAMPLE).digest


class TestTheText:
    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "job.xml: has no element"),
            (b"   ", "has no element"),
            (b"<job_desc>", "job.xml:1: has no </job_desc>"),
            (b"<job_desc>\n\n<task></job_desc>", "job.xml:3: has no </task> for the <task> of this line"),
            (b"<job_desc>\n<task><weight>1</job_desc>", "job.xml:2: has no </task>"),
            (b"<task><application>a</application></task>", "expected <job_desc> as the outermost element, not <task>"),
            (b"text<job_desc></job_desc>", "expected <job_desc> as the outermost element, not 'text'"),
            (b'<!DOCTYPE job_desc [<!ENTITY e "x">]><job_desc>&e;</job_desc>', "DOCTYPE"),
            (b'<!DOCTYPE job_desc SYSTEM "http://127.0.0.1:9/x.dtd"><job_desc/>', "DOCTYPE"),
            (b"<job_desc>" + b" " * job_parse.MAX_BYTES + b"</job_desc>", "larger than"),
            (b"<a>" * 5000, "expected <job_desc>"),
            (b"<job_desc>\x00</job_desc>", "has no </job_desc>"),
            (b"<job_desc><!-- </job_desc>", "has no </job_desc>"),
            (b"\xff\xfe<\x00\x00\xd8", "has no element"),
            (b"<job_desc><task>" + b"<setenv>A=1</setenv>" * 100_001 + b"</task></job_desc>", "more than 100000 elem"),
        ],
    )
    def test_what_is_no_job_file(self, content: bytes, words: str) -> None:
        (error,) = errors_of(content)
        assert words in error

    def test_a_bomb_of_entities_is_refused_quickly(self) -> None:
        entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 30))
        assert errors_of(f'<!DOCTYPE j [<!ENTITY e0 "x">{entities}]><job_desc>&e29;</job_desc>')

    @pytest.mark.no_cover  # tracing would take most of the time
    @pytest.mark.timeout(20)
    def test_many_elements_do_not_take_long(self) -> None:
        unknown = "".join(f"<a{number}/>" for number in range(90_000))
        forwards = "<port_forward><guest_port>1</guest_port></port_forward>" * 18_000
        warnings = warnings_of(f"<job_desc>{unknown}</job_desc>")
        assert len(warnings) == WARNINGS_LIMIT + 1
        assert warnings[-1] == f"job.xml:1: and {90_001 - WARNINGS_LIMIT} more after these"
        assert errors_of(guest_task(forwards))[-1].endswith("and 16999 more after these")

    @pytest.mark.no_cover
    @pytest.mark.timeout(20)
    @pytest.mark.parametrize("piece", [b"<!--", b"<![CDATA[", b"<a ", b"<a", b"<a/", b"<?xml ", b"-->"])
    def test_no_input_takes_long(self, piece: bytes) -> None:
        assert errors_of(piece * (1_000_000 // len(piece)))
        assert errors_of(b"<job_desc>" + piece * (1_000_000 // len(piece)))
        assert errors_of(b"<job_desc><task><command_line>" + piece * (1_000_000 // len(piece)))

    def test_blanks_before_the_declaration_are_allowed_and_lines_still_count(self) -> None:
        text = "\n\n<?xml version='1.0'\n encoding='utf-8'?>\n<job_desc>\n<task/></job_desc>"
        assert errors_of(text)[0].startswith("job.xml:6: ")

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "iso-8859-1", "cp1252"])
    def test_encodings_that_are_named(self, encoding: str) -> None:
        """Names are bytes, as to BOINC's wrapper, whatever the file says of itself; UTF-16 has none such."""
        declared = encoding.removesuffix("-sig")
        text = (
            f"<?xml version='1.0' encoding='{declared}'?><job_desc><task><application>é</application></task></job_desc>"
        )
        job = parse(text.encode(encoding))
        name = "é" if encoding.startswith("utf") else os.fsdecode(b"\xe9")
        assert (job.tasks[0].application, job.warnings) == (name, ())

    def test_bytes_that_are_not_utf8_stay_bytes_with_a_warning(self) -> None:
        content = "<job_desc>\n<task><application>é</application></task></job_desc>".encode("latin-1")
        assert os.fsencode(parse(content).tasks[0].application) == b"\xe9"
        assert "job.xml:2: is not UTF-8 and does not say what it is" in warnings_of(content)[0]
        character = "<job_desc><task><application>&#233;</application></task></job_desc>"
        assert os.fsencode(parse(character).tasks[0].application) == b"\xe9"

    def test_a_guest_task_is_utf8(self) -> None:
        text = guest_task("\n<command_line>é</command_line>").encode("latin-1")
        assert "job.xml:2: <command_line>: expected UTF-8" in errors_of(text)[0]

    @given(st.binary(max_size=40))
    def test_any_bytes_of_a_name_come_back(self, name: bytes) -> None:
        name = name.translate(None, b"\0<").strip()
        written = name.replace(b"&", b"&amp;")
        content = b"<job_desc><task><application>a</application><stdout_filename>%b</stdout_filename></task></job_desc>"
        assert os.fsencode(parse(content % written).tasks[0].stdout_filename) == name

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_ends_of_lines(self, end: str) -> None:
        text = PAGE_EXAMPLE.replace("\n", end)
        assert replace(parse(text), digest="") == replace(parse(PAGE_EXAMPLE), digest="") or end == "\r"
        assert [task.command_line for task in parse(text).tasks] == ["5"]

    @given(st.integers(1, 70), st.sampled_from([PAGE_EXAMPLE, "<job_desc>\n<![CDATA[x]]><!-- -- --><task y='z'/>"]))
    def test_pieces_make_no_difference(self, size: int, text: str) -> None:
        """The file comes in pieces, which may end anywhere."""
        whole = Complaints("job.xml"), Complaints("job.xml")
        pieces = [text.encode()[at : at + size] for at in range(0, len(text), size)]
        found: list[object] = []
        for complaints, read in zip(
            whole, (io.BytesIO(text.encode()).read, lambda _: pieces.pop(0) if pieces else b""), strict=True
        ):
            try:
                found.append(list(elements.read_job(read, job_parse._JOB, complaints)))
            except elements.NotAJob as error:
                found.append([(str(error), error.line)])
        assert found[0] == found[1]
        assert whole[0] == whole[1]

    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["", "\n", " \n\n", "<!-- -->", "<x/>"]),
                st.sampled_from(["a", "\n b\n", "", "&amp;", "&", "é", "1,5", "<y/>"]),
                st.sampled_from(["weight", "command_line", "setenv", "virtualmachine"]),
            ),
            max_size=8,
        )
    )
    def test_tasks_that_are_written_alike_are_read_as_any_others(self, parts: list[tuple[str, str, str]]) -> None:
        """With the pattern that is made of two like ones, and without."""
        text = "".join(
            f"{blank}<task>{blank}<application>p</application>{blank}<{name}>{value}</{name}></task>"
            for blank, value, name in parts
            for _ in range(3)
        )
        found = []
        for limit in (elements.SHAPES_LIMIT, 0):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(elements, "SHAPES_LIMIT", limit)
                found.append(job_parse.examine(f"<job_desc>{text}</job_desc>".encode(), "job.xml"))
        assert found[0] == found[1]

    def test_a_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match=r"no-such\.xml: the job file cannot be read: No such file"):
            job_parse.examine_file(tmp_path / "no-such.xml", "x")
        with pytest.raises(BadInput, match="the job file cannot be read"):
            job_parse.examine_file(Path("a\0b"), "x")

    @pytest.mark.timeout(30)
    def test_a_huge_file_is_not_read_whole(self, tmp_path: Path) -> None:
        huge = tmp_path / "job.xml"
        with huge.open("wb") as file:
            file.write(b"<job_desc>" + b" " * 100)
            file.seek(10**9)
            file.write(b" ")
        assert job_parse.examine_file(huge, "x").errors[0].text.startswith("has no </job_desc>")  # NULs: over at once
        with huge.open("r+b") as file:
            file.write(b"<job_desc></job_desc>")
        assert job_parse.examine_file(huge, "x").errors[0].text.startswith("is larger than")

    def test_memory_is_that_of_the_tasks(self) -> None:
        """A comment of any length, and elements that mean nothing, leave nothing behind."""
        task = "<task><application>p</application><command_line>{}</command_line></task>\n"
        text = "".join(task.format(number) for number in range(5000))
        content = f"<job_desc>{text}<!-- {'x' * 2_000_000} -->{'<junk/>' * 50_000}</job_desc>".encode()
        tracemalloc.start()
        try:
            job = parse(content)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len(job.tasks) == 5000
        assert peak < 4 * len(content) + 5_000_000


ELEMENTS = sorted(
    {
        "job_desc",
        "task",
        "unzip_task",
        "VMmanage_task",
        "application",
        "weight",
        "setenv",
        "command_line",
        "unzip_input",
        "zip_output",
        "zipfilename",
        "filename",
    }
    | {"time_limit", "daemon", "priority", "stdout_filename", "trickle_up_period", "guest_port", "exec_dir"}
    | guestfields.NAMES
)
VALUES = st.one_of(
    st.sampled_from(
        ["", "1", "0", "-1", "x", "HostMain", "nan", "1e400", "../x", "A=b", "ncpus", "qemu", "&lt;", "&#0;"]
    ),
    st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<&")),
)


@st.composite
def trees(draw: st.DrawFn, depth: int = 3) -> str:
    name = draw(st.sampled_from(ELEMENTS))
    if depth and draw(st.booleans()):
        inside = "".join(draw(st.lists(trees(depth=depth - 1), max_size=5)))
    else:
        inside = draw(VALUES)
    return f"<{name}/>" if draw(st.integers(0, 9)) == 0 else f"<{name}>{inside}</{name}>"


def check_only_the_documented_error(content: bytes) -> None:
    findings = job_parse.examine(content, "job.xml")
    assert (findings.job is None) == bool(findings.errors)
    if findings.job is None:
        with pytest.raises(BadInput, match=r"\Ajob\.xml.*"):
            job_parse.parse(content, "job.xml")
    else:
        assert job_parse.parse(content, "job.xml") == findings.job
        assert all(task.weight >= 0 for task in findings.job.tasks)


@given(st.binary())
def test_arbitrary_bytes_give_the_documented_error_only(content: bytes) -> None:
    check_only_the_documented_error(content)


@given(trees())
def test_arbitrary_trees_give_the_documented_error_only(text: str) -> None:
    check_only_the_documented_error(f"<job_desc>{text}</job_desc>".encode())


@settings(max_examples=50)
@given(st.integers(0, len(PAGE_EXAMPLE)), st.binary(max_size=4))
def test_a_damaged_page_example_gives_the_documented_error_only(position: int, damage: bytes) -> None:
    text = PAGE_EXAMPLE.encode()
    check_only_the_documented_error(text[:position] + damage + text[position + len(damage) :])
