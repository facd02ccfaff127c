"""Real processes, launched by torchrun over gloo; what they check is in ``job.py``."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import hetlora_agg

JOB = Path(__file__).parent / "job.py"


def launched(folder):
    """Exit code and output of one job of four processes; nothing it started is left."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"]
    command += ["--standalone", "--max-restarts", "1", str(JOB), str(folder)]
    sources = [Path(hetlora_agg.__file__).parent.parent, JOB.parent.parent]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, sources)),
        # Or a restarted job finds the addresses of the one before, in torch 2.4 to 2.13 at least.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as launcher:
        try:
            output, _ = launcher.communicate(timeout=180)
        finally:
            # The launcher and its children are a group of their own.
            with suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
    return launcher.returncode, output


def test_real_processes_give_what_one_gives_name_who_is_lost_and_go_on(tmp_path):
    code, output = launched(tmp_path)
    assert len(list(tmp_path.glob("checked-*.txt"))) == 4, output
    texts = {path.name: path.read_text() for path in tmp_path.glob("error-*.txt")}
    assert sorted(texts) == ["error-0.txt", "error-2.txt", "error-3.txt"], output
    for text in texts.values():
        assert text.startswith("ProcessLostError: distributed.result")
        assert "load(folder)" in text
    # It holds torch's store: what the others can know depends on who leaves first.
    assert "process 1 did not come to this step" in texts["error-0.txt"]
    assert "failed (exitcode: -9)" in output
    assert code == 0, output
    assert [(tmp_path / f"equal-{rank}.txt").read_text() for rank in range(4)] == ["1"] * 4
