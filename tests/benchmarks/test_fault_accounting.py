"""benchmarks/faults.py: every sample is counted once, and this project's own loader comes out of it as it should."""

import hashlib
import sys

import pytest
from support.processes import ROOT


@pytest.fixture(scope="module")
def faults():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import faults
    finally:
        sys.path.pop(0)
    return faults


CONTENT = {f"{number:05d}": (b"image %d" % number, b"caption %d" % number) for number in range(10)}


def row(image: int | None, caption: int | None, key: str = "x", damaged: bool = False) -> dict:
    """What a reader reports of one delivery."""
    data = None if image is None else CONTENT[f"{image:05d}"][0] + b"!" * damaged
    text = None if caption is None else CONTENT[f"{caption:05d}"][1].decode()
    return {"key": key, "image": None if data is None else hashlib.sha256(data).hexdigest(), "caption": text}


def test_every_sample_is_counted_once(faults):
    rows = [row(0, 0), row(0, 0), row(1, 1), row(2, 3), row(4, None), row(None, 5), row(6, 6, damaged=True)]
    rows += [row(None, None, "merged"), row(7, 7, "../x"), row(None, None, "00008")]
    found = faults.classify([*rows, {"ended": "complete"}], CONTENT, "killed")
    assert (found.intact, found.mispaired, found.half, found.damaged) == (3, 1, 3, 1)
    assert (found.lost_in_silence, found.lost_with_message, found.duplicated) == (2, 0, 1)
    assert found.escaping_keys == 1 and found.state == "complete"
    counted = found.intact + found.mispaired + found.half + found.damaged + found.lost_in_silence
    assert counted == len(CONTENT)


def test_who_was_told_of_a_loss(faults):
    def lost(*rows: dict) -> tuple[int, int, int]:
        found = faults.classify([row(0, 0), *rows], CONTENT, "hung")
        return found.lost_in_silence, found.lost_with_log, found.lost_with_message

    assert lost({"ended": "complete"}) == (9, 0, 0)
    assert lost({"logged": "an error"}, {"ended": "complete"}) == (0, 9, 0)
    assert lost({"message": "bad"}, {"logged": "an error"}, {"ended": "complete"}) == (0, 0, 9)
    assert lost({"ended": "stopped", "error": "E"}) == (0, 0, 9)
    assert faults.classify([row(0, 0)], CONTENT, "hung").state == "hung"


def test_the_project_under_its_own_faults(faults, tmp_path):
    """Damage after opening: nothing in silence, nothing wrong, at the cost of what is damaged and no more."""
    content = faults.make_samples()
    bench = faults.Bench(tmp_path, sys.executable, 120, content)
    column = next(column for column in faults.COLUMNS if column.reader == "dalle_scale_opened")
    expected = {"header_bit": 100, "cut_in_payload": 80, "payload_bit": 99}
    for fault in (fault for fault in faults.FAULTS if fault.name in expected):
        found = bench.run(fault, column)
        wrong = found.lost_in_silence + found.lost_with_log + found.mispaired + found.damaged + found.half
        assert (found.state, wrong, found.intact) == ("complete", 0, expected[fault.name])
        assert found.lost_with_message == 100 - found.intact
