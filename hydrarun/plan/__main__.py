"""`python -m hydrarun.plan`: a plan in a process of its own, for one that has no memory left. JSON in, JSON out."""

import json
import sys

from hydrarun.plan.choose import planned
from hydrarun.plan.command import as_json
from hydrarun.plan.devices import Device

asked = json.load(sys.stdin)
for target in asked["targets"]:
    from hydrarun import targets

    targets.allow(target)
json.dump(as_json(planned(asked["config"], Device(**asked["device"]), asked["ranks"])), sys.stdout)
