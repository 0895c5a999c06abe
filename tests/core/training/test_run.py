"""What the processes of a run compare before they train."""

from pathlib import Path

from opensora_core.training.run import _seen_at


def test_other_data_is_seen_as_other_data(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "clips.csv").write_text("path,text\n")
    folder, manifest = _seen_at(str(tmp_path)), _seen_at(str(tmp_path / "clips.csv"))
    (tmp_path / "b.mp4").write_bytes(b"")
    (tmp_path / "clips.csv").write_text("path,text\na.mp4,a cat\n")
    assert folder != _seen_at(str(tmp_path)) and manifest != _seen_at(str(tmp_path / "clips.csv"))
    assert _seen_at(str(tmp_path / "absent")) == "nothing" and _seen_at("world") == "world"
