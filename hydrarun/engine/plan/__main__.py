"""`python -m hydrarun.engine.plan`: plans for a process that is out of memory. JSON in, JSON out."""

import json
import sys

from hydrarun.engine.plan.devices import DeviceSpec
from hydrarun.engine.plan.planner import plan_configuration, plan_to_json

asked = json.load(sys.stdin)
for target in asked["targets"]:
    from hydrarun.config import targets

    targets.allow_target(target)
json.dump(plan_to_json(plan_configuration(asked["config"], DeviceSpec(**asked["device"]), asked["ranks"])), sys.stdout)
