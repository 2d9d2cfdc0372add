"""The command and its ranks with a fake runner that executes the prompt.

`1 SIGKILL`: rank 1 is killed during the job; `1 exit 3`: it ends without a word; `1 ZeroDivisionError`: it raises this
error; `1 sleep`: it is slow.
"""

from __future__ import annotations

import builtins
import json
import os
import signal
import sys
import time
import types
from pathlib import Path

import torch
import torch.distributed as dist

from hydrarun.__main__ import main
from hydrarun.config import targets
from hydrarun.core import errors
from hydrarun.engine.ranks import local_group, worker


class FakeRunner:
    def __init__(self, config, progress, device):
        self.config = config
        self.device = device
        self.load_s, self.read_bytes = 1.0, 5
        self.jobs = 0

    def reset_stats(self) -> None:
        self.load_s, self.read_bytes = 0.0, 0

    def generate(self, **sampling) -> list:
        self.work(self.config, None)
        return []

    def work(self, config: dict, output_dir: Path | None) -> dict:
        """Execute the prompt; return facts about all ranks and the request."""
        pids = [None] * dist.get_world_size()
        dist.all_gather_object(pids, os.getpid())
        if output_dir:
            (output_dir / "pids.json").write_text(json.dumps(pids))
        act(config["sampling"]["prompt"])
        total = torch.ones(1)
        dist.all_reduce(total)
        self.jobs += 1
        asked = {"seed": config["sampling"]["seed"], "prompt": config["sampling"]["prompt"], "device": self.device}
        done = {"pids": pids, "total": total.item(), "jobs": self.jobs, "load_s": self.load_s}
        done["read_bytes"] = self.read_bytes
        here = {"threads": torch.get_num_threads(), "allowed": targets.list_user_allowed()}
        return {**asked, **done, **here}


def run_single(runner: FakeRunner, config: dict, output_dir: Path) -> dict:
    record = runner.work(config, output_dir)
    (output_dir / "run.json").write_text(json.dumps({"format": 1, "status": "complete", "outputs": [], **record}))
    return record


def follow_single(runner: FakeRunner, config: dict) -> None:
    runner.work(config, None)


def act(prompt: str) -> None:
    rank, _, what = prompt.partition(" ")
    if rank != os.environ["RANK"]:
        return
    print(f"about to {what}", file=sys.stderr, flush=True)
    if what.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, what))
    elif what.startswith("exit"):
        os._exit(int(what.split()[1]))
    elif what == "sleep":
        time.sleep(60)
    else:
        words = "the sky is green"
        raise (getattr(builtins, what, None) or getattr(errors, what))(words)


worker.make_runner = FakeRunner
# in place of the module that imports diffusers
single = types.ModuleType("hydrarun.engine.runs.single")
single.run_single, single.follow_single = run_single, follow_single  # type: ignore[attr-defined]
sys.modules[single.__name__] = single
local_group.WORKER = __spec__.name if __spec__ else "tests.helpers.fake_rank"

if __name__ == "__main__":
    words = sys.argv[1:]
    sys.exit(worker.main(words) if words[0].isdigit() else main())
