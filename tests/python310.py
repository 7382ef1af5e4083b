"""Imports the TensorRT backend and runs what of it needs no GPU; for Python 3.10, by itself.

TensorRT 8.6, the last whose whole wheel can be had anywhere, needs Python 3.10. Packages that this
interpreter lacks are stood for by mocks, since the question is the language and its library.
"""

import importlib.util
import sys
import tempfile
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

PACKAGES = ("numpy", "PIL", "tokenizers")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]


class Mocks(MetaPathFinder, Loader):
    def find_spec(self, name, path, target=None):
        missing = name.partition(".")[0] in MISSING
        return ModuleSpec(name, self, is_package=True) if missing else None

    def create_module(self, spec):
        return MagicMock()

    def exec_module(self, module):
        pass


sys.meta_path.append(Mocks())

from engine.backends import trt  # noqa: E402
from engine.errors import DeviceError, PlanError  # noqa: E402
from engine.plans.plan import BULK, PlanKey, PlanRecord, TowerPlan, read_plan  # noqa: E402
from engine.plans.runtimes import installed_library  # noqa: E402

tower = TowerPlan(
    min_shape=(1, 8),
    max_shape=(8, 77),
    plan_bytes=1,
    activation_bytes=None,
    num_fp8_products=0,
    fallbacks=("x",),
)
record = PlanRecord(
    engine_id="fp16-0",
    key=PlanKey(flavour="tensorrt", version="8.6.0", architecture="sm_90", profile=BULK),
    image=tower,
    text=tower,
    build_seconds=1.0,
    files={},
)
with tempfile.TemporaryDirectory() as folder:
    record.write(Path(folder))
    assert read_plan(Path(folder)) == record


def refuses(call, kind):
    try:
        call()
    except kind:
        return True
    return False


assert refuses(lambda: read_plan(Path("/nowhere")), PlanError)
assert refuses(lambda: installed_library("tensorrt_rtx"), DeviceError)
assert trt.TrtConfig().num_slots == 3
sys.stdout.write(f"{sys.version_info.major}.{sys.version_info.minor}\n")
