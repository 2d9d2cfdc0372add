"""`python -m hydrarun.engine.plan`: a plan in its own process, for one that has no memory left. JSON in, JSON out."""

import json
import sys

from hydrarun.engine.plan.devices import Device
from hydrarun.engine.plan.planner import as_json, planned

asked = json.load(sys.stdin)
for target in asked["targets"]:
    from hydrarun.config import targets

    targets.allow(target)
json.dump(as_json(planned(asked["config"], Device(**asked["device"]), asked["ranks"])), sys.stdout)
