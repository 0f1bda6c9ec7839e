"""`vmwrapper convert` writes a job.xml, and replaces none unasked."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmwrapper.cli import convert


def test_the_job_file_lies_beside_and_is_not_replaced(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    toml, job = tmp_path / "job.toml", tmp_path / "job.xml"
    toml.write_text('image_name = "a:1"')
    assert convert.run([str(toml)]) == 0
    assert "<container>a.vdi</container>" in job.read_text()
    toml.write_text('image_name = "b:1"')
    assert convert.run([str(toml)]) == 206
    assert "exists: --force replaces it" in capfd.readouterr().err
    assert "a.vdi" in job.read_text()
    assert convert.run([str(toml), "--force"]) == 0
    assert "b.vdi" in job.read_text()
    assert convert.run([str(toml), "-o", str(tmp_path / "other.xml")]) == 0
    assert (tmp_path / "other.xml").read_bytes() == job.read_bytes()


def test_nothing_is_written_of_what_cannot_be_converted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    toml = tmp_path / "job.toml"
    toml.write_text("use_gpu = true")
    assert convert.run([str(toml)]) == 206
    assert f"{toml}: use_gpu" in capfd.readouterr().err
    assert convert.run([str(tmp_path / "none.toml")]) == 206
    assert convert.run([]) == 206
    toml.write_text("")
    assert convert.run([str(toml), "--input", "../x"]) == 206
    assert [path.name for path in tmp_path.iterdir()] == ["job.toml"]
