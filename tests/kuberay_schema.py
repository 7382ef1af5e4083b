"""KubeRay's own schema of a RayJob, cut down to what jobs/deploy/rayjob.yaml uses.

    git clone --depth 1 --branch v1.7.0 https://github.com/ray-project/kuberay KUBERAY
    PYTHONPATH=. python3 tests/kuberay_schema.py \
        KUBERAY/helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml

writes tests/data/kuberay-rayjob.json anew, which a test holds the manifest against. What is not
used is not in it, so that a field that is misspelled, or new to the manifest, is no part of it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = ROOT / "jobs" / "deploy" / "rayjob.yaml"
SCHEMA = ROOT / "tests" / "data" / "kuberay-rayjob.json"
_KEPT = (
    "type",
    "format",
    "enum",
    "pattern",
    "minimum",
    "maximum",
    "minLength",
    "minItems",
    "anyOf",
)


def cut_schema(schema: dict[str, Any], used: list[Any]) -> dict[str, Any]:
    """A schema without what no value has, that allows nothing else.

    Args:
        schema: As of a CustomResourceDefinition.
        used: The values that it is for.
    """
    cut = {name: schema[name] for name in _KEPT if name in schema}
    if schema.get("x-kubernetes-int-or-string"):
        cut.pop("type", None)
        cut["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    mappings = [value for value in used if isinstance(value, dict)]
    if "properties" in schema:
        names = sorted({name for value in mappings for name in value} & schema["properties"].keys())
        cut["properties"] = {
            name: cut_schema(
                schema["properties"][name], [value[name] for value in mappings if name in value]
            )
            for name in names
        }
        cut["required"] = sorted(schema.get("required", []))
        cut["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    elif isinstance(schema.get("additionalProperties"), dict):
        entries = [entry for value in mappings for entry in value.values()]
        cut["additionalProperties"] = cut_schema(schema["additionalProperties"], entries)
    if "items" in schema:
        entries = [entry for value in used if isinstance(value, list) for entry in value]
        cut["items"] = cut_schema(schema["items"], entries)
    return cut


def main(crd_path: str) -> None:
    """Write the schema that a CustomResourceDefinition has for the manifest."""
    crd = yaml.safe_load(Path(crd_path).read_text())
    (version,) = [version for version in crd["spec"]["versions"] if version["name"] == "v1"]
    manifest = yaml.safe_load(MANIFEST.read_text())
    cut = cut_schema(version["schema"]["openAPIV3Schema"], [manifest])
    # What every object has is Kubernetes' part.
    cut["properties"]["metadata"] = {"type": "object"}
    SCHEMA.write_text(json.dumps(cut, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
