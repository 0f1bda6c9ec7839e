"""vmwrapper.boinc: init_data.xml, channels, files and the pure runtime's clock rules."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmwrapper.boinc import files, initdata
from vmwrapper.boinc.channels import (
    CHANNEL_BYTES,
    SEGMENT_BYTES,
    Channel,
    Channels,
    Heartbeat,
    app_status_text,
    read_heartbeat,
)
from vmwrapper.boinc.python import PureRuntime
from vmwrapper.boinc.runtime import AppStatus, InitData, UploadStatus

INIT_DATA = b"""<app_init_data>
<major_version>7</major_version>
<minor_version>20</minor_version>
<release>5</release>
<app_version>113</app_version>
<userid>1</userid>
<app_name>worker</app_name>
<project_preferences>
<max_jobs>3</max_jobs></project_preferences>
<user_name>A &amp; B</user_name>
<project_dir>/var/lib/boinc/projects/example.org_proj</project_dir>
<boinc_dir>/var/lib/boinc</boinc_dir>
<authenticator>x</authenticator>
<wu_name>wu</wu_name>
<result_name>wu_0</result_name>
<shm_key>-1</shm_key>
<slot>2</slot>
<client_pid>4321</client_pid>
<wu_cpu_time>17.250000</wu_cpu_time>
<starting_elapsed_time>20.500000</starting_elapsed_time>
<checkpoint_period>60.000000</checkpoint_period>
<gpu_device_num>-1</gpu_device_num>
<ncpus>2.000000</ncpus>
<rsc_fpops_est>1e12</rsc_fpops_est>
<rsc_memory_bound>5e8</rsc_memory_bound>
<rsc_disk_bound>1e9</rsc_disk_bound>
<host_info>
    <p_vm_extensions_disabled>1</p_vm_extensions_disabled>
    <virtualbox_version>7.2.22</virtualbox_version>
</host_info>
<global_preferences>
   <cpu_usage_limit>80.000000</cpu_usage_limit>
</global_preferences>
</app_init_data>
"""


class TestInitData:
    def test_what_a_client_writes(self) -> None:
        assert initdata.parse(INIT_DATA) == InitData(
            project_dir=Path("/var/lib/boinc/projects/example.org_proj"),
            result_name="wu_0",
            project_url="example.org_proj",
            slot=2,
            client_pid=4321,
            ncpus=2.0,
            wu_cpu_time=17.25,
            starting_elapsed_time=20.5,
            checkpoint_period=60.0,
            rsc_fpops_est=1e12,
            rsc_memory_bound=5e8,
            rsc_disk_bound=1e9,
            cpu_usage_limit=80.0,
            app_version=113,
        )

    def test_what_is_missing_has_defaults(self) -> None:
        assert initdata.parse(b"<app_init_data></app_init_data>") == InitData()

    @pytest.mark.parametrize("period", [b"0", b"-5", b"nan", b"x", b""])
    def test_a_useless_checkpoint_period_is_300_s(self, period: bytes) -> None:
        text = b"<app_init_data><checkpoint_period>%b</checkpoint_period></app_init_data>" % period
        assert initdata.parse(text).checkpoint_period == 300.0

    def test_names_that_are_no_xml_do_not_hide_the_rest(self) -> None:
        """The client does not escape names and preferences."""
        text = INIT_DATA.replace(b"<wu_name>wu<", b"<wu_name>a & b<").replace(b"<app_name>worker", b"<app_name>w\xe9")
        data = initdata.parse(text)
        assert (data.client_pid, data.shm_key, data.result_name) == (4321, -1, "wu_0")

    @pytest.mark.parametrize(
        "preferences",
        [
            b"<motd>one<br>two</motd>",
            b"</stray></project_dir><slot>9</slot><ncpus>7</ncpus>",
            b"<x a=b c><option selected>",
            b"<a>" * 300 + b"</b>" * 299,
            b"\xff\xfe & < > &nope; <!-- <![CDATA[ ",
            b"<host_info><virtualbox_version>1</virtualbox_version>",
            b"</app_init_data>",
        ],
    )
    def test_preferences_are_whatever_the_project_wrote(self, preferences: bytes) -> None:
        content = INIT_DATA.replace(b"<max_jobs>3</max_jobs>", preferences)
        assert initdata.parse(content) == initdata.parse(INIT_DATA)

    @pytest.mark.parametrize(
        "name", [b"R&D", b"M\xfcller", b"a<b", b"a>b", b"a'\"b c", "日本".encode(), b"a</b>", b"x;y"]
    )
    def test_paths_are_bytes(self, name: bytes) -> None:
        """The client writes them without escaping."""
        content = INIT_DATA.replace(b"/var/lib/boinc", b"/home/" + name)
        data = initdata.parse(content)
        assert os.fsencode(str(data.project_dir)) == b"/home/" + name + b"/projects/example.org_proj"
        assert (data.slot, data.client_pid) == (2, 4321)

    @given(st.binary(min_size=1))
    def test_any_path_comes_back(self, path: bytes) -> None:
        path = b"/" + path.translate(None, b"\0&").strip() + b"/x"
        hypothesis.assume(b"</project_dir>" not in path and b"</app_init_data>" not in path and b"<!--" not in path)
        hypothesis.assume(
            not any(b"<" + name in path for name in (b"host_info", b"global_pref", b"project_pref", b"proxy"))
        )
        content = b"<app_init_data>\n<project_dir>" + path + b"</project_dir>\n<slot>3</slot></app_init_data>"
        data = initdata.parse(content)
        assert data.project_dir == Path(os.fsdecode(path))
        assert data.slot == 3 or b"<slot" in path

    def test_of_a_field_the_first_counts_at_any_depth(self) -> None:
        text = b"<app_init_data><new><slot> 4 </slot></new><slot>5</slot></app_init_data>"
        assert initdata.parse(text).slot == 4

    @pytest.mark.parametrize("value", [b"", b"x", b"1,5", b"nan", b"inf", b"2.5", b"1e400", b"99999999999999999999"])
    def test_a_number_that_is_none_has_its_default(self, value: bytes) -> None:
        text = b"<app_init_data><slot>%b</slot><wu_cpu_time>%b</wu_cpu_time></app_init_data>" % (value, value)
        data = initdata.parse(text)
        assert data.slot == 0
        assert data.wu_cpu_time == (float(value) if value in {b"2.5", b"99999999999999999999"} else 0.0)

    @pytest.mark.timeout(20)
    @pytest.mark.parametrize("piece", [b"<project_preferences>", b"<slot>", b"<a>", b"<!--", b"<slot ", b"</x>"])
    def test_no_file_takes_long(self, piece: bytes) -> None:
        begin, end = b"<app_init_data>", b"<client_pid>7</client_pid></app_init_data>"
        content = begin + piece * ((initdata.MAX_BYTES - 100) // len(piece)) + end
        assert initdata.parse(content).slot == 0

    @pytest.mark.parametrize("length", range(0, len(INIT_DATA) - 20, 37))
    def test_a_half_file_is_an_error(self, length: int) -> None:
        with pytest.raises(initdata.InitDataError):
            initdata.parse(INIT_DATA[:length])

    @given(st.binary())
    def test_arbitrary_bytes_give_the_documented_error_only(self, content: bytes) -> None:
        for whole in (content, content + b"</app_init_data>", b"<app_init_data>" + content + b"</app_init_data>"):
            try:
                data = initdata.parse(whole)
            except initdata.InitDataError:
                continue
            assert data.checkpoint_period >= 1

    def test_no_file_is_no_error(self, tmp_path: Path) -> None:
        assert initdata.read(tmp_path / "init_data.xml") is None
        with pytest.raises(initdata.InitDataError, match="cannot be read"):
            initdata.read(tmp_path)


class TestChannels:
    def test_a_message_goes_through_once(self) -> None:
        channels = Channels(bytearray(SEGMENT_BYTES))
        assert channels.receive(Channel.HEARTBEAT) is None
        assert channels.send(Channel.HEARTBEAT, "<heartbeat/>")
        assert not channels.send(Channel.HEARTBEAT, "<other/>")
        assert channels.receive(Channel.HEARTBEAT) == "<heartbeat/>"
        assert channels.receive(Channel.HEARTBEAT) is None
        assert channels.text(Channel.HEARTBEAT) == "<heartbeat/>"

    @pytest.mark.parametrize(("channel", "offset"), [(Channel.GRAPHICS_REPLY, 3072), (Channel.APP_STATUS, 5120)])
    def test_where_they_are(self, channel: Channel, offset: int) -> None:
        buffer = bytearray(SEGMENT_BYTES)
        Channels(buffer).send(channel, "text")
        assert buffer[offset : offset + 6] == b"\1text\0"
        assert buffer.count(0) == SEGMENT_BYTES - 5

    @given(st.text(st.characters(exclude_characters="\0")), st.text(st.characters(exclude_characters="\0")))
    def test_no_message_reaches_into_another_channel(self, first: str, second: str) -> None:
        channels = Channels(bytearray(SEGMENT_BYTES))
        channels.send(Channel.APP_STATUS, first * 50)
        channels.send(Channel.TRICKLE_UP, second)
        channels.replace(Channel.APP_STATUS, second)
        expected = second.encode("utf-8", "replace")[: CHANNEL_BYTES - 2].decode("utf-8", "replace")
        assert channels.receive(Channel.TRICKLE_UP) == expected
        assert channels.receive(Channel.APP_STATUS) == expected
        assert not any(channels.is_full(channel) for channel in Channel)

    def test_too_small_a_memory_is_refused(self) -> None:
        with pytest.raises(ValueError, match="has 10 bytes instead of 8192"):
            Channels(bytearray(10))

    def test_heartbeats(self) -> None:
        text = "<heartbeat/>\n<wss>1000.000000</wss>\n<max_wss>2e3</max_wss>\n<network_suspended/>"
        assert read_heartbeat(text) == Heartbeat(True, True)
        assert read_heartbeat("<sporadic_ca>e</sporadic_ca>") == Heartbeat(False)
        assert read_heartbeat("<network_suspended>0</network_suspended>").network_suspended is False

    @given(st.builds(AppStatus, *[st.floats(allow_nan=False)] * 3, st.integers(0, 2**31), st.floats(0, 1e300)))
    def test_a_status_fits_in_its_channel(self, status: AppStatus) -> None:
        text = app_status_text(status, want_network=True)
        for name in ("current_cpu_time", "checkpoint_cpu_time", "fraction_done"):
            assert f"<{name}>" in text[: CHANNEL_BYTES - 2]


class TestFiles:
    def test_the_finish_file(self, tmp_path: Path) -> None:
        files.write_finish_file(tmp_path, 195)
        assert (tmp_path / "boinc_finish_called").read_text() == "195\n"
        files.write_finish_file(tmp_path, 0, "two\nlines")
        assert (tmp_path / "boinc_finish_called").read_text() == "0\ntwo lines\n\n"

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (None, UploadStatus.NOT_READY),
            (b"", UploadStatus.NOT_READY),
            (b"<status>", UploadStatus.NOT_READY),
            (b"<status>0</status>\n", UploadStatus.DONE),
            (b"<status>1</status>\n", UploadStatus.DONE),
            (b"<status>-161</status>\n", UploadStatus.FAILED),
        ],
    )
    def test_upload_status(self, tmp_path: Path, content: bytes | None, expected: UploadStatus) -> None:
        if content is not None:
            (tmp_path / "boinc_ufs_out").write_bytes(content)
        assert files.upload_status(tmp_path, "out") is expected


def test_a_full_disk_delays_a_trickle_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = PureRuntime(tmp_path)
    runtime.init()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_trickle_up", fail)
        runtime.send_trickle_up("variety", "text")
    assert not (tmp_path / "trickle_up.xml").exists()
    runtime.finish(0)
    runtime.close()
    assert (tmp_path / "trickle_up.xml").exists()
    assert (tmp_path / "boinc_finish_called").read_text() == "0\n"


class TestThePureRuntimesClock:
    """What takes minutes with a real clock."""

    @pytest.fixture
    def clock(self) -> list[float]:
        return [1000.0]

    def start(self, slot: Path, clock: list[float], client_pid: int, alive: list[bool]) -> tuple[PureRuntime, Channels]:
        (slot / "init_data.xml").write_text(
            f"<app_init_data><shm_key>-1</shm_key><client_pid>{client_pid}</client_pid></app_init_data>"
        )
        (slot / "boinc_mmap_file").write_bytes(bytes(SEGMENT_BYTES))
        runtime = PureRuntime(slot, monotonic=lambda: clock[0], client_exists=lambda _: alive[0])
        runtime.init()
        with (slot / "boinc_mmap_file").open("r+b") as file:
            return runtime, Channels(mmap.mmap(file.fileno(), SEGMENT_BYTES))

    def test_a_client_without_pid_is_given_up_after_30_s_without_a_beat(
        self, tmp_path: Path, clock: list[float]
    ) -> None:
        runtime, client = self.start(tmp_path, clock, 0, [True])
        for _ in range(290):
            clock[0] += 0.1
            assert not runtime.get_status().no_heartbeat
        client.send(Channel.HEARTBEAT, "<heartbeat/>")
        for _ in range(300):
            clock[0] += 0.1
            assert not runtime.get_status().no_heartbeat
        clock[0] += 0.3
        assert runtime.get_status().no_heartbeat
        runtime.close()

    def test_a_computer_that_slept_has_not_lost_its_client(self, tmp_path: Path, clock: list[float]) -> None:
        runtime, _ = self.start(tmp_path, clock, 0, [True])
        clock[0] += 8 * 3600
        assert not runtime.get_status().no_heartbeat
        runtime.close()

    def test_a_client_with_a_pid_may_be_silent_but_not_gone(self, tmp_path: Path, clock: list[float]) -> None:
        alive = [True]
        runtime, _ = self.start(tmp_path, clock, 42, alive)
        for _ in range(1000):
            clock[0] += 1.0
            assert not runtime.get_status().no_heartbeat
        alive[0] = False
        clock[0] += 10.0
        assert runtime.get_status().no_heartbeat
        runtime.close()

    def test_checkpoint_period_of_the_preferences(self, tmp_path: Path, clock: list[float]) -> None:
        runtime, _ = self.start(tmp_path, clock, 42, [True])
        clock[0] += 299.0
        assert not runtime.time_to_checkpoint()
        clock[0] += 1.0
        assert runtime.time_to_checkpoint()
        runtime.checkpoint_completed()
        assert not runtime.time_to_checkpoint()
        runtime.close()
