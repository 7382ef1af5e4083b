"""`clipmill engine`: what it prints as text and as JSON, its exit codes, and the ways out."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest

from engine.errors import EngineError
from engine.gate_reports import add_gate_report, last_gate
from engine.promotion import promote, promoted
from engine.registry import Registry
from jobs.engine import ACTIONS, main
from tests.calibrated_engines import CalibratedEngines, put_sabotaged_engine
from tests.checkpoints import save_clip
from tests.commands import clipmill_engine
from tests.engines import FP8_ID, FP32_ID, PLAN_ID, write_engine, write_plan
from tests.fake_gpu import FakeCuda

ROOT = Path(__file__).resolve().parent.parent
OTHER_ID = "fp32-8899aabbccddeeff"


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Empty."""
    return Registry(str(tmp_path / "engines"))


@pytest.fixture
def three(registry: Registry, calibrated_engines: CalibratedEngines) -> Registry:
    """Two fp32 engines and an fp8 one with a plan, of a real checkpoint, but of a few bytes."""
    for engine_id in (FP32_ID, OTHER_ID, FP8_ID):
        registry.obtain(
            engine_id,
            lambda path, name=engine_id: write_engine(
                path, engine_id=name, checkpoint_digest=calibrated_engines.digest
            ),
        )
    registry.obtain_plan(FP8_ID, PLAN_ID, write_plan)
    return registry


@pytest.fixture
def copied(calibrated_engines: CalibratedEngines, registry: Registry) -> Registry:
    """The calibrated engines, in a folder that the test may change."""
    shutil.copytree(calibrated_engines.engines_dir, registry.local.directory)
    return registry


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    cuda.fail("cudaDeviceGetAttribute", "cudaErrorNoDevice", forever=True)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)


def files_of(registry: Registry) -> dict[str, bytes]:
    directory = registry.local.directory
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def table(text: str) -> dict[str, str]:
    """The rows of `show`: name -> fact."""
    return {line[:16].strip(): line[17:] for line in text.splitlines()[1:]}


# build


def test_a_build_says_what_it_made_and_what_its_gate_saw(
    calibrated_engines: CalibratedEngines,
) -> None:
    registry = Registry(str(calibrated_engines.engines_dir))
    done, engine_id = calibrated_engines.first, calibrated_engines.first_id
    gate = last_gate(registry, engine_id)
    assert gate is not None
    report = json.loads(registry.root.read(f"{gate.path}/report.json"))
    image, text = report["agreements"]["image"], report["agreements"]["text"]
    recall = report["recalls"][1]
    lines = done.out.splitlines()
    assert lines[0] == f"engine {engine_id} of {calibrated_engines.checkpoint_dir}"
    assert lines[1] == "  kept in 16 bit: no unit"
    assert lines[2] == (
        f"  image  cosine mean {image['cosine_mean']:.4f}, 1st percentile "
        f"{image['cosine_p1']:.4f}, lowest {image['cosine_min']:.4f}; overlap of ten neighbours "
        f"{image['neighbour_overlap']:.4f} (64 held-out rows)"
    )
    assert lines[3].startswith(f"  text   cosine mean {text['cosine_mean']:.4f}, ")
    assert lines[5] == (
        "  image-to-text recall@1, 5, 10: "
        + ", ".join(f"{recall['measured'][cutoff]:.3f}" for cutoff in ("1", "5", "10"))
        + "; float32 "
        + ", ".join(f"{recall['reference'][cutoff]:.3f}" for cutoff in ("1", "5", "10"))
    )
    page = registry.local.directory / gate.path / "report.html"
    assert lines[6:] == ["gate passed by onnxruntime: promoted", f"report: {page}"]
    assert f"Gate of {engine_id}" in page.read_text()
    assert report["passed"] is True
    assert (report["engine_id"], report["device"]) == (engine_id, "CPU")


def test_a_build_shows_its_steps_on_stderr(calibrated_engines: CalibratedEngines) -> None:
    for done in (calibrated_engines.first, calibrated_engines.second):
        events = [json.loads(line) for line in done.err.splitlines()]
        assert {event["event"] for event in events} == {"step"}
        stages = [event["stage"] for event in events]
        assert [stage for stage in dict.fromkeys(stages) if "judge with" not in stage] == [
            "sample",
            *(f"image: {stage}" for stage in ("calibrate", "round", "judge")),
            *(f"text: {stage}" for stage in ("calibrate", "round", "judge")),
            "export",
            *(f"engine: {name}" for name in ("image", "text")),
            *(f"reference: {name}" for name in ("image", "text")),
        ]


def test_a_build_as_json(calibrated_engines: CalibratedEngines) -> None:
    made = calibrated_engines.second.json
    assert made.keys() == {"manifest", "gate", "report_path", "plan_paths", "plans", "is_promoted"}
    assert made["is_promoted"] is True
    assert made["plan_paths"] == []
    assert made["gate"]["faults"] == []
    assert made["gate"]["thresholds"]["max_recall_loss"] == 1
    assert made["manifest"]["precision"] == "fp8"
    assert made["manifest"]["quantization"]["num_calibration_rows"] == 512
    assert (Path(made["report_path"]) / "report.html").exists()


def test_what_libraries_print_is_no_result(monkeypatch: pytest.MonkeyPatch, capsys):
    def printing(*_: object, **__: object) -> NoReturn:
        sys.stdout.write("Loading extension ...")
        raise EngineError("no more")

    monkeypatch.setattr("jobs.engine.build_engine", printing)
    with pytest.raises(EngineError, match="no more"):
        main(["build", "--checkpoint", "c", "--calibrate", "d", "--json"])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Loading extension" in printed.err


def test_another_seed_is_another_engine_and_the_last_to_pass_is_promoted(
    calibrated_engines: CalibratedEngines,
) -> None:
    registry = Registry(str(calibrated_engines.engines_dir))
    first, second = calibrated_engines.first_id, calibrated_engines.second_id
    assert first != second
    assert sorted(registry.engine_ids()) == sorted([first, second])
    assert promoted(registry, calibrated_engines.digest) == second


def test_the_same_build_again_makes_nothing_but_a_report(
    calibrated_engines: CalibratedEngines, copied: Registry
) -> None:
    before = files_of(copied)
    again = calibrated_engines.build(copied.local.directory, "--seed", 2)
    assert again.code == 0
    assert again.out.splitlines()[-1].endswith("/gates/00000002/report.html")
    assert "calibrate" not in again.err
    after = files_of(copied)
    assert {name: after[name] for name in before} == before
    assert {Path(name).parent.name for name in after.keys() - before.keys()} == {"00000002"}


def test_an_engine_of_16_bit_is_built_and_promoted(
    calibrated_engines: CalibratedEngines, registry: Registry
) -> None:
    done = calibrated_engines.build(registry.local.directory, "--precision", "fp16")
    assert done.code == 0
    assert done.out.startswith("engine fp16-")
    assert "16 bit" not in done.out
    assert promoted(registry, calibrated_engines.digest) == done.out.split()[1]


def test_zero_shot_accuracy_where_there_are_labels(
    calibrated_engines: CalibratedEngines, registry: Registry
) -> None:
    options = ("--precision", "fp16", "--label-column", "number", "--max-top1-loss", 1)
    done = calibrated_engines.build(registry.local.directory, *options)
    assert done.code == 0
    (line,) = (line for line in done.out.splitlines() if line.startswith("  zero-shot"))
    assert re.fullmatch(r"  zero-shot top-1 of 3 classes: 0\.\d{3}; float32 0\.\d{3}", line)


@pytest.mark.usefixtures("_no_gpu")
def test_plans_for_cards_that_are_not_there(
    calibrated_engines: CalibratedEngines, registry: Registry
) -> None:
    options = ("--precision", "fp16", "--plans-for", "sm_89")
    done = calibrated_engines.build(registry.local.directory, *options)
    assert done.code == 0
    engine_id = done.out.split()[1]
    plan_ids = re.findall(r"^  plan (\S+): image without FP8; text without FP8$", done.out, re.M)
    assert [plan_id.rpartition("-")[2] for plan_id in plan_ids] == ["bulk256", "query8"]
    assert registry.plan_ids(engine_id) == plan_ids
    unknown = calibrated_engines.build(
        registry.local.directory, "--precision", "fp16", "--plans-for", "sm_90"
    )
    assert unknown.code == 1
    assert "not for sm_90: use TensorRT" in unknown.err


def test_a_gate_that_fails_is_exit_1_with_the_faults_and_the_report(
    calibrated_engines: CalibratedEngines, registry: Registry, tmp_path: Path
) -> None:
    engine_id = put_sabotaged_engine(
        calibrated_engines, engines_dir=registry.local.directory, folder=tmp_path / "other"
    )
    done = calibrated_engines.build(registry.local.directory, "--precision", "fp16")
    assert done.code == 1
    lines = done.out.splitlines()
    assert lines[0].startswith(f"engine {engine_id} of ")
    faults = [line for line in lines if line.startswith("  fault: ")]
    assert any(" image: 1st percentile of cosines " in fault for fault in faults)
    assert any(" text: lowest cosine " in fault for fault in faults)
    page = registry.local.directory / engine_id / "gates" / "00000001" / "report.html"
    assert lines[-2:] == ["gate failed by onnxruntime: not promoted", f"report: {page}"]
    assert '<h2 id="verdict">Failed</h2>' in page.read_text()
    assert promoted(registry, calibrated_engines.digest) is None

    refused = clipmill_engine("promote", engine_id, "--engines", registry.uri)
    assert (refused.code, refused.out) == (1, "")
    assert f"engine {engine_id} failed its gate at " in refused.err
    assert str(page.parent) in refused.err
    assert (
        "gate             failed"
        in clipmill_engine("show", engine_id, "--engines", registry.uri).out
    )

    as_json = calibrated_engines.build(registry.local.directory, "--precision", "fp16", "--json")
    assert as_json.code == 1
    assert as_json.json["is_promoted"] is False
    assert as_json.json["gate"]["faults"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--precision", "fp32"), "invalid choice: 'fp32'"),
        (("--backend", "cuda"), "invalid choice: 'cuda'"),
        (("--min-cosine-p1", "2"), "min_cosine_p1=2.0: expected 0 to 1"),
        (("--held-out", "3"), "num_held_out=3: expected at least 64"),
        (("--rows", "100"), "num_rows=100 (--rows): expected at least 512 to calibrate fp8 with"),
        (("--surprise", "1"), "unrecognized arguments: --surprise"),
    ],
)
def test_faulty_options_are_exit_2(
    calibrated_engines: CalibratedEngines,
    tmp_path: Path,
    options: tuple[str, ...],
    message: str,
) -> None:
    done = calibrated_engines.build(tmp_path, *options)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["--checkpoint", "--calibrate"])
def test_what_is_missing_is_exit_2(missing: str) -> None:
    given = {"--checkpoint": "c", "--calibrate": "d"}
    del given[missing]
    done = clipmill_engine("build", *(word for pair in given.items() for word in pair))
    assert done.code == 2
    assert f"the following arguments are required: {missing}" in done.err


@pytest.mark.usefixtures("_no_gpu")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--checkpoint", "/nowhere"), "checkpoint '/nowhere': no such folder"),
        (("--calibrate", "/nowhere"), "/nowhere"),
        (("--rows", "5000"), "Name a larger catalog, or one with fewer rejects"),
        (("--image-column", "none"), "which is calibrated too; name the column with --image-col"),
        (("--label-column", "colour"), "colour"),
        (("--backend", "tensorrt"), "needs a GPU, and there is none: use --backend auto"),
        (("--min-cosine-min", "1"), "not close enough even with every unit in 16 bit"),
    ],
)
def test_what_is_not_there_is_exit_1_with_the_way_out(
    calibrated_engines: CalibratedEngines,
    registry: Registry,
    options: tuple[str, ...],
    message: str,
) -> None:
    done = calibrated_engines.build(registry.local.directory, *options)
    assert (done.code, done.out) == (1, "")
    assert message in done.err
    assert registry.engine_ids() == []


def test_a_card_without_fp8_is_exit_1_before_any_work(
    calibrated_engines: CalibratedEngines, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", FakeCuda(capability=(8, 0)))
    done = calibrated_engines.build(registry.local.directory)
    assert done.code == 1
    assert "this GPU (sm_80) has no FP8: use an fp16 engine" in done.err
    assert "sample" not in done.err


# list, show


def test_no_engines(registry: Registry) -> None:
    done = clipmill_engine("list", "--engines", registry.uri)
    assert (done.code, done.out, done.err) == (0, "no engines\n", "")
    assert clipmill_engine("list", "--engines", registry.uri, "--json").json == []


def test_engines_in_lines_the_newest_first(three: Registry) -> None:
    add_gate_report(three, FP8_ID, passed=True, files={})
    promote(three, FP8_ID)
    hour = 3600
    for age, engine_id in enumerate((FP8_ID, OTHER_ID, FP32_ID)):
        written = time.time() - age * hour
        os.utime(three.local.directory / engine_id / "manifest.json", (written, written))
    done = clipmill_engine("list", "--engines", three.uri)
    head, *lines = done.out.splitlines()
    assert head.split() == ["engine", "promoted", "gate", "plans", "MiB", "checkpoint"]
    assert [line.split() for line in lines] == [
        [FP8_ID, "yes", "passed", "1", "0", "acme/clip"],
        [OTHER_ID, "none", "0", "0", "acme/clip"],
        [FP32_ID, "none", "0", "0", "acme/clip"],
    ]
    assert {line.index("acme/clip") for line in lines} == {head.index("checkpoint")}
    entries = clipmill_engine("list", "--engines", three.uri, "--json").json
    assert [entry["manifest"]["engine_id"] for entry in entries] == [FP8_ID, OTHER_ID, FP32_ID]
    assert [entry["is_promoted"] for entry in entries] == [True, False, False]
    assert [entry["gate_passed"] for entry in entries] == [True, None, None]
    assert [entry["plan_ids"] for entry in entries] == [[PLAN_ID], [], []]


def test_engines_are_those_of_the_environment(
    three: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPMILL_ENGINES", three.uri)
    assert FP8_ID in clipmill_engine("list").out


def test_one_engine_in_full(calibrated_engines: CalibratedEngines) -> None:
    first, second = calibrated_engines.first_id, calibrated_engines.second_id
    done = clipmill_engine("show", second, "--engines", calibrated_engines.engines_dir)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[0] == second
    facts = table(done.out)
    assert facts["checkpoint"] == str(calibrated_engines.checkpoint_dir)
    assert "revision" not in facts
    assert (facts["precision"], facts["dimension"]) == ("fp8", "24")
    assert facts["modalities"] == "image, text"
    assert (facts["gate"], facts["promoted"], facts["plans"]) == ("passed", "yes", "none")
    assert facts["calibrated with"] == f"512 rows of {calibrated_engines.catalog_dir}"
    assert "nvidia-modelopt 0." in facts["versions"]
    steps = facts["promotions"].split("; ")
    assert [step.split()[1:] for step in steps] == [["promote", first], ["promote", second]]
    shown = clipmill_engine(
        "show", first, "--engines", calibrated_engines.engines_dir, "--json"
    ).json
    assert shown["entry"]["manifest"]["engine_id"] == first
    assert shown["entry"]["is_promoted"] is False
    assert [step["number"] for step in shown["promotions"]] == [1, 2]


def test_an_engine_that_was_never_judged(three: Registry) -> None:
    shown = clipmill_engine("show", FP8_ID, "--engines", three.uri).out
    facts = table(shown)
    assert (facts["gate"], facts["promoted"]) == ("never judged", "no")
    assert f"\nplan {PLAN_ID}: damaged, or of a newer Clipmill\n" in shown
    assert not {"calibrated with", "promotions"} & facts.keys()


@pytest.mark.parametrize("action", ["show", "promote"])
def test_an_engine_that_is_not_there_is_exit_1_and_list_is_named(
    three: Registry, action: str
) -> None:
    done = clipmill_engine(action, "fp8-gone", "--engines", three.uri)
    assert (done.code, done.out) == (1, "")
    assert f"engines {three.uri}: no engine fp8-gone" in done.err
    assert "`clipmill engine list` shows those there are" in done.err


@pytest.mark.parametrize("action", ["show", "promote"])
def test_what_can_be_no_id_is_exit_2(three: Registry, action: str) -> None:
    done = clipmill_engine(action, "../engines", "--engines", three.uri)
    assert done.code == 2
    assert "id '../engines': expected letters, digits" in done.err
    assert clipmill_engine(action, "--engines", three.uri).code == 2


# promote, rollback


def test_promote_says_what_was_current_before(three: Registry) -> None:
    first = clipmill_engine("promote", FP32_ID, "--engines", three.uri)
    assert (first.code, first.out) == (0, f"{FP32_ID} is current\n")
    second = clipmill_engine("promote", OTHER_ID, "--engines", three.uri)
    assert (second.code, second.out) == (0, f"{OTHER_ID} is current, before it {FP32_ID}\n")
    entry = clipmill_engine("promote", OTHER_ID, "--engines", three.uri, "--json").json
    assert (entry["number"], entry["action"]) == (2, "promote")
    assert (entry["engine_id"], entry["previous"]) == (OTHER_ID, FP32_ID)


def test_an_engine_without_a_gate_is_not_promoted(
    three: Registry, calibrated_engines: CalibratedEngines
) -> None:
    done = clipmill_engine("promote", FP8_ID, "--engines", three.uri)
    assert done.code == 1
    assert f"engine {FP8_ID} was never compared with fp32, so it is neither promoted" in done.err
    assert "Compare it again with `clipmill engine build`" in done.err
    assert promoted(three, calibrated_engines.digest) is None


def test_rollback_says_what_is_current_again(
    three: Registry, calibrated_engines: CalibratedEngines
) -> None:
    words = ("rollback", "--engines", three.uri, "--checkpoint", calibrated_engines.checkpoint_dir)
    for engine_id in (FP32_ID, OTHER_ID):
        promote(three, engine_id)
    before = {name: content for name, content in files_of(three).items() if "promo" not in name}
    done = clipmill_engine(*words)
    assert (done.code, done.out) == (0, f"{FP32_ID} is current again, after {OTHER_ID}\n")
    assert promoted(three, calibrated_engines.digest) == FP32_ID
    after = {name: content for name, content in files_of(three).items() if "promo" not in name}
    assert after == before
    promote(three, OTHER_ID)
    entry = clipmill_engine(*words, "--json").json
    assert (entry["action"], entry["engine_id"], entry["number"]) == ("rollback", FP32_ID, 5)
    nothing = clipmill_engine(*words)
    assert (nothing.code, nothing.out) == (1, "")
    assert f"{FP32_ID} is the first that was promoted" in nothing.err
    assert "Promote one with `clipmill engine promote`" in nothing.err


def test_rollback_of_another_checkpoint(three: Registry, tmp_path: Path) -> None:
    promote(three, FP32_ID)
    other = save_clip(tmp_path / "other", seed=3)
    done = clipmill_engine("rollback", "--engines", three.uri, "--checkpoint", other)
    assert done.code == 1
    assert "to go back to: none was ever promoted" in done.err
    done = clipmill_engine("rollback", "--engines", three.uri, "--checkpoint", tmp_path / "gone")
    assert done.code == 1
    assert "no such folder" in done.err
    assert clipmill_engine("rollback", "--engines", three.uri).code == 2


# gc


def make_old(registry: Registry, *engine_ids: str, days: float) -> None:
    written = time.time() - days * 24 * 3600
    for engine_id in engine_ids:
        os.utime(registry.local.directory / engine_id / "manifest.json", (written, written))


def test_gc_removes_what_nobody_needs(three: Registry) -> None:
    promote(three, FP32_ID)
    make_old(three, FP32_ID, OTHER_ID, days=8)
    leftover = three.local.directory / ".building" / FP8_ID / "tmp123"
    leftover.mkdir(parents=True)
    (leftover / "image.onnx").write_bytes(bytes(3 * 2**20))
    before = files_of(three)

    dry = clipmill_engine("gc", "--engines", three.uri, "--dry-run")
    assert dry.code == 0
    assert dry.out.splitlines() == [
        f"would remove .building/{FP8_ID}/tmp123 (left by a killed builder, 3.0 MiB)",
        f"would remove {OTHER_ID} (neither promoted nor kept for a rollback, 8 days old, 0.0 MiB)",
        "would remove 2 items, 3.0 MiB",
    ]
    listed = clipmill_engine("gc", "--engines", three.uri, "--dry-run", "--json").json
    assert [(item["place"], item["path"]) for item in listed] == [
        ("node", f".building/{FP8_ID}/tmp123"),
        ("node", OTHER_ID),
    ]
    assert files_of(three) == before

    done = clipmill_engine("gc", "--engines", three.uri)
    assert done.code == 0
    assert done.out == dry.out.replace("would remove", "removed")
    assert sorted(three.engine_ids()) == sorted([FP32_ID, FP8_ID])
    assert not leftover.exists()
    again = clipmill_engine("gc", "--engines", three.uri)
    assert again.out == "removed 0 items, 0.0 MiB\n"


def test_gc_keeps_as_long_and_as_many_as_told(three: Registry) -> None:
    for engine_id in (FP32_ID, OTHER_ID):
        promote(three, engine_id)
    make_old(three, FP32_ID, FP8_ID, days=3)

    def found(*options: object) -> set[str]:
        done = clipmill_engine("gc", "--engines", three.uri, "--dry-run", "--json", *options)
        return {item["path"] for item in done.json}

    assert found() == set()
    assert found("--max-age-days", 2) == {FP8_ID}
    assert found("--max-age-days", 2, "--num-promotions", 1) == {FP8_ID, FP32_ID}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-age-days", "-1"), "max_age_days=-1.0: expected at least 0"),
        (("--num-promotions", "0"), "num_promotions=0: expected at least 1"),
        (("--num-promotions", "few"), "invalid int value: 'few'"),
    ],
)
def test_gc_with_faulty_options_removes_nothing(
    three: Registry, options: tuple[str, ...], message: str
) -> None:
    before = files_of(three)
    done = clipmill_engine("gc", "--engines", three.uri, *options)
    assert done.code == 2
    assert message in done.err
    assert files_of(three) == before


# The command itself


def test_no_action_and_help_list_the_actions() -> None:
    for words in ((), ("--help",)):
        done = clipmill_engine(*words)
        assert done.code == 0
        assert all(f"  {action} " in done.out for action in ACTIONS)


def test_an_unknown_action_is_exit_2() -> None:
    done = clipmill_engine("destroy")
    assert (done.code, done.out) == (2, "")
    assert "no action 'destroy'" in done.err
    assert "  rollback " in done.err


def test_python_m_gives_the_same_exit_codes(registry: Registry) -> None:
    for words, code, message in (
        (["show", "fp8-gone"], 1, "`clipmill engine list`"),
        (["gc", "--num-promotions", "0"], 2, "expected at least 1"),
        (["list"], 0, ""),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "jobs.engine", *words, "--engines", registry.uri],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code
        assert message in done.stderr
        assert "Traceback" not in done.stderr
