"""Programs run in order, as typed; the first failure ends the row."""

import pytest

from dalle_scale.programs import Programs
from dalle_scale.types import UserError


def test_order_times_and_failure(tmp_path, capfd):
    program = "import sys, time\ntime.sleep(0.2)\nprint(sys.argv[1])\nsys.exit(sys.argv[1] == 'bad')\n"
    (tmp_path / "say.py").write_text(program)
    programs = Programs(tmp_path)
    good = {name: programs.python("say.py", name) for name in ("one", "two words")}
    seconds = programs.run(good)
    assert list(seconds) == ["one", "two words", "total"] and seconds["total"] >= seconds["one"] > 0
    printed = capfd.readouterr().out.split("\n")
    assert "[2/2] two words" in printed and printed.index("one") < printed.index("two words")
    assert any(line.endswith("say.py 'two words'") and str(tmp_path) not in line for line in printed)
    with pytest.raises(UserError, match="step 'b' failed with exit code 1"):
        programs.run({"b": programs.python("say.py", "bad"), "c": programs.python("say.py", "never")})
    assert "never" not in capfd.readouterr().out.replace("'never'", "")


@pytest.mark.parametrize(("gpus", "cores", "expected"), [(0, 1, 1), (0, 2, 2), (0, 64, 2), (1, 64, 1), (8, 2, 2)])
def test_launcher_line(tmp_path, monkeypatch, gpus, cores, expected):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    line = Programs(tmp_path).typed(Programs(tmp_path).deepspeed("launch/train.py", "configs/x.yaml"))
    assert line == f"deepspeed -q --num_gpus {expected} launch/train.py configs/x.yaml"
