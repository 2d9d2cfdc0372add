"""torchrun on several machines, simulated by two agents on this one: one directory, one writer."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

from tests.helpers.paths import environment


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_two_nodes_draw_together(tmp_path):
    port = free_port()
    agents = []
    for node in range(2):
        where = ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(node)]
        where += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        asked = ["parallel=ulysses2", "device=cpu", "sampling.prompt=fine", "hydra.run.dir=here"]
        words = [sys.executable, "-m", "torch.distributed.run", *where, "-m", "tests.helpers.fake_rank", *asked]
        folder = tmp_path / str(node)  # as on machines that share no disk
        folder.mkdir()
        agents.append(subprocess.Popen(words, cwd=folder, env=environment()))
    assert [agent.wait(120) for agent in agents] == [0, 0]
    record = json.loads((tmp_path / "0" / "here" / "run.json").read_text())
    assert record["total"] == 2.0  # both ranks took part
    assert list((tmp_path / "1").iterdir()) == []
