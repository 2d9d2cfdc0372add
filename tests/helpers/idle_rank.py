"""A rank that imports no torch and does no job. It ends with its driver."""

from __future__ import annotations

import socket
import sys

from hydrarun.engine.ranks.worker import DriverLink

if __name__ == "__main__":
    DriverLink(socket.socket(fileno=int(sys.argv[2]))).receive_job()
