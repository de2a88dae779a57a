"""`fastssl eval` on a whole run folder: what is read, what is chosen, what is kept, what is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastssl.checkpoint.save_load import plain_weights
from fastssl.cli import main
from fastssl.commands.eval import evaluate_run as evaluate_module
from fastssl.commands.eval import evaluation_plan as plan_module
from fastssl.commands.eval.evaluate_run import evaluate_run
from fastssl.commands.eval.evaluation_plan import plan_evaluation
from fastssl.config import build_config
from fastssl.errors import ConfigError
from fastssl.evaluation.images import Images, Part
from fastssl.evaluation.parts import choose_parts
from fastssl.models.backbones import build_backbone
from fastssl.models.two_view import TwoViewModel
from fastssl.tracking.run_folder import RunFolder
from fastssl.tracking.writers import read_rows
from pipelines.beton import BetonReader, BetonWriter

ALL = ("knn", "linear", "logistic", "few_label", "linear_augmented", "finetune")
CONFIG = {
    "views": {"recipe": "digits", "size_px": 16},
    "model": {
        "backbone": "timm/resnet18",
        "stem": "cifar",
        "backbone_kwargs": {"channels": [8, 16, 16, 16], "layers": [1, 1, 1, 1]},
        "pool_px": 2,
        "projector_hidden": [],
        "projector_dim": 8,
    },
    "eval": {
        "baselines": False,
        "knn_k": [1, 10],
        "few_labels": [3],
        "num_draws": 2,
        "num_seeds": 2,
        "sgd_batch_size": 32,
        "linear_epochs": 3,
        "linear_lrs": [0.03, 0.1],
        "augmented_epochs": 2,
        "finetune_epochs": 2,
        "finetune_lrs": [0.03, 0.1],
        "augment": {"flip_p": 0.0, "crop_scale": [0.6, 1.0]},
    },
}
NOT_RESULTS = ("wall_s", "environment")


def _write(path: Path, images: np.ndarray, labels: np.ndarray, class_names: list[str] | None = None) -> Path:
    with BetonWriter(path, len(images), class_names=class_names) as writer:
        for image, label in zip(images, labels, strict=True):
            writer.write_raw(image, label=int(label))
    return path


@pytest.fixture(scope="module")
def digit_arrays(digits):
    readers = [BetonReader(digits / f"{split}.beton") for split in ("train", "test")]
    return [(np.stack([r.decode(i) for i in range(n)]), r.labels[:n]) for r, n in zip(readers, (240, 120), strict=True)]


@pytest.fixture
def run_folder(tmp_path, digit_arrays) -> Path:
    """A run of no steps: a checkpoint of random weights, 240 digits to learn from, 120 to be judged on."""
    (train_x, train_y), (test_x, test_y) = digit_arrays
    data = {
        "train": str(_write(tmp_path / "train.beton", train_x, train_y)),
        "test": str(_write(tmp_path / "test.beton", test_x, test_y)),
    }
    run = {"dir": str(tmp_path / "run"), "num_threads": 1}
    cfg = build_config(CONFIG | {"data": data, "run": run})
    folder = RunFolder(cfg.run.dir)
    folder.create(cfg, 1)
    torch.manual_seed(0)
    for step in (5, 20):
        checkpoint = folder.checkpoints / f"step_{step:08d}"
        checkpoint.mkdir(parents=True)
        torch.save(plain_weights(TwoViewModel(cfg.model, 16), {}, 16), checkpoint / "weights.pt")
    return folder.path


def _lines(folder: Path, num: int) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in NOT_RESULTS} for line in read_rows(folder / "eval.jsonl")[-num:]]


def test_every_protocol_twice_gives_the_same_lines_and_encodes_once(run_folder, monkeypatch):
    encoded = []
    real = evaluate_module.encode_batches
    monkeypatch.setattr(evaluate_module, "encode_batches", lambda *a: encoded.append(1) or real(*a))
    table = str(evaluate_run(run_folder, what=ALL))
    assert len(encoded) == 2  # train and test
    first = _lines(run_folder, 7)
    assert [line["protocol"] for line in first] == ["knn", "linear", "logistic", *["few_label"] * 2, *ALL[4:]]
    evaluate_run(run_folder, what=ALL)
    assert len(encoded) == 2
    assert len(read_rows(run_folder / "eval.jsonl")) == 14  # appended
    assert _lines(run_folder, 7) == first
    for line in first:
        assert line["name"] in table
        assert line["checkpoint_step"] == 20
        assert line["settings"]["augment"] == CONFIG["eval"]["augment"]
        assert len(line["top1_each"]) == (1 if line["name"] in ("knn", "logistic") else 2)
        assert (line["interval95_repetitions"] is None) == (len(line["top1_each"]) == 1)
        assert len(line["per_class"]) == 10
        assert line["top5"] > line["top1"] > (0.02 if line["name"] == "finetune" else 0.2)  # two epochs teach little
        low, high = line["interval95_test_images"]
        assert low < line["top1"] < high


@pytest.mark.slow
def test_fine_tuning_learns_and_leaves_the_encoder_as_it_was(run_folder, digits):
    settings = ["eval.finetune_epochs=8", "eval.finetune_lrs=[0.1]", "eval.num_seeds=1", "eval.knn_k=10"]
    whole = {"on": digits / "train.beton", "test": digits / "test.beton"}
    evaluate_run(run_folder, [*settings, "eval.augment={flip_p: 0, crop: false}"], what=["knn", "finetune"], **whole)
    frozen, tuned = _lines(run_folder, 2)
    assert tuned["top1"] > 0.85
    assert tuned["top1"] > frozen["top1"] + 0.1
    assert tuned["chosen"]["validation_top1"] > 0.85


def test_protocols_leave_the_encoder_as_it_was(run_folder, monkeypatch):
    encoders = []
    real = evaluate_module.Images

    def images(cfg, data, views, encoder, **rest):
        encoders.append(encoder)
        return real(cfg, data, views, encoder, **rest)

    monkeypatch.setattr(evaluate_module, "Images", images)
    evaluate_run(run_folder, what=["linear_augmented", "finetune"])
    saved = torch.load(run_folder / "checkpoints/step_00000020/weights.pt", weights_only=True)["backbone"]
    [encoder] = encoders
    assert all(torch.equal(value, saved[name]) for name, value in encoder.state_dict().items())


def test_a_truncated_cache_is_made_again_with_the_same_result(run_folder, capsys):
    evaluate_run(run_folder, what=["knn"])
    first = _lines(run_folder, 1)
    for path in (run_folder / "features").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    evaluate_run(run_folder, what=["knn"])
    assert _lines(run_folder, 1) == first
    assert capsys.readouterr().err.count("damaged") == 2


def test_no_choice_depends_on_a_test_label(run_folder, tmp_path, digit_arrays):
    test_x, test_y = digit_arrays[1]
    other = _write(tmp_path / "permuted.beton", test_x, (test_y + 1) % 10)
    quick = ["eval.num_seeds=1", "eval.finetune_epochs=1"]
    evaluate_run(run_folder, quick, what=ALL)
    evaluate_run(run_folder, quick, what=ALL, test=other)
    right, wrong = np.split(np.array(_lines(run_folder, 14), dtype=object), 2)
    for a, b in zip(right, wrong, strict=True):
        assert a["name"] == b["name"]
        assert a["chosen"] == b["chosen"]
        assert a["top1"] != b["top1"]


def test_a_step_is_judged_and_has_features_of_its_own(run_folder):
    evaluate_run(run_folder, what=["knn"])
    evaluate_run(run_folder, what=["knn"], step=5)
    last, early = _lines(run_folder, 2)
    assert (last["checkpoint_step"], early["checkpoint_step"]) == (20, 5)
    assert last["top1"] != early["top1"]
    assert len(list((run_folder / "features").iterdir())) == 4
    with pytest.raises(ConfigError, match=r"--step: .* no checkpoint of step 6, only of 5, 20"):
        evaluate_run(run_folder, step=6)


def test_another_data_set_without_a_test_file_is_held_out_of(run_folder, tmp_path, digit_arrays):
    images, labels = digit_arrays[0]
    labels = np.where(np.arange(len(labels)) < 20, -1, labels % 3)  # other classes, some images without a label
    other = _write(tmp_path / "other.beton", images, labels)
    table = str(evaluate_run(run_folder, ["data.holdout_fraction=0.25"], what=["knn", "finetune"], on=other))
    assert "0.25 of" in table
    assert "held out (--test is not given)" in table
    for line in _lines(run_folder, 2):
        assert line["on"] == str(other)
        assert line["train"]["num_labelled"] + line["test"]["num_labelled"] == 220
        assert line["test"]["num_labelled"] == line["num_test_images"]
        assert len(line["per_class"]) == 3
    cfg = build_config({"data": {"holdout_fraction": 0.25}})
    train, test, _ = choose_parts(cfg.data, on=other)
    assert not set(train.ids) & set(test.ids)
    assert sorted({*train.ids, *test.ids}) == list(range(20, 240))


def test_json_has_the_lines_of_the_results_and_nothing_else_is_on_stdout(run_folder, capfd):
    assert main(["eval", str(run_folder), "--what", "knn", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    [line] = read_rows(run_folder / "eval.jsonl")[-1:]
    assert found["rows"][-1] == line
    assert found["checkpoint_steps"] == {"pre-trained encoder": 20}


def test_another_data_set_with_its_test_file(run_folder, tmp_path, digit_arrays):
    other, other_test = (
        _write(tmp_path / f"{name}.beton", images, labels // 5)
        for name, (images, labels) in zip(("a", "b"), digit_arrays, strict=True)
    )
    assert f"accuracy on {other_test}" in str(evaluate_run(run_folder, what=["logistic"], on=other, test=other_test))
    [line] = _lines(run_folder, 1)
    assert (line["train"]["num_labelled"], line["test"]["num_labelled"]) == (240, 120)
    assert line["top1"] > 0.55


def test_random_views_are_of_the_asked_for_images_and_plain_ones_in_order(run_folder, digit_arrays):
    cfg = RunFolder(run_folder).load_config()
    reader = BetonReader(cfg.data.train)
    part = Part(reader=reader, ids=np.arange(0, 240, 2))
    images = Images(
        cfg.eval, cfg.data, cfg.views, torch.nn.Flatten(), train=part, test=part, device=torch.device("cpu")
    )
    try:
        wanted = np.arange(10, 100)
        num_batches, batches = images.augmented(wanted, 1, 0)
        seen = [(views.clone(), rows) for views, rows in batches]
        assert len(seen) == num_batches == 7  # of 32; the last 16 of the epoch are dropped
        rows = np.concatenate([rows for _, rows in seen])
        assert len(set(rows.tolist())) == len(rows)
        assert set(rows.tolist()) < set(wanted.tolist())
        other_seed = np.concatenate([rows for _, rows in images.augmented(wanted, 0, 0)[1]])
        assert rows.tolist() != other_seed.tolist()
        plain = torch.cat(list(images.plain_train(rows)))
        augmented = torch.cat([views for views, _ in seen])
        same, crossed = (augmented - plain).square().mean(), (augmented - plain.flip(0)).square().mean()
        assert 0 < same < 0.8 * crossed  # a random view is nearer to its own image's plain view
    finally:
        images.close()


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["--what", "knn", "nope"], ["eval.what", "nope", "linear_augmented"]),
        (["--what", "few_label", "--set", "eval.few_labels=[30]"], ["eval.few_labels asks for 30 images per class"]),
        (["--what", "few_label", "--set", "eval.few_labels=[]"], ["eval.few_labels must list numbers"]),
        (["--set", "eval.knn_k=near"], ["eval.knn_k", "near"]),
        (["--set", "eval.knnk=5"], ["unknown key eval.knnk", "knn_k"]),
        (["--set", "eval.augment={flip_q: 1}"], ["eval.augment", "flip_q"]),
        (["--step", "7"], ["--step", "5, 20"]),
        (["--on", "/no/such.beton"], ["/no/such.beton"]),
        (["--on", "UNLABELLED"], ["--on", "unlabelled.beton", "fewer than two classes with labels"]),
        (["--on", "ONE_CLASS"], ["--on", "one_class.beton", "fewer than two classes with labels"]),
        (["--test", "UNLABELLED"], ["--test", "no labels, which evaluation needs"]),
        (["--test", "NAMED", "--on", "OTHER_NAMES"], ["--test", "the classes of", "y"]),
        (["--test", "MORE_CLASSES"], ["--test", "labels that do not occur in", "10, 11"]),
        (["--on", "NINE", "--what", "logistic", "--set", "data.holdout_fraction=0.2"], ["logistic", "at least 10"]),
        (["--on", "NINE", "--set", "data.holdout_fraction=0"], ["--test is not given", "data.holdout_fraction"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else None,
)
def test_bad_input_is_one_line(settings, parts, run_folder, tmp_path, digit_arrays, capsys):
    images, labels = digit_arrays[1]
    files = {
        "UNLABELLED": (labels * 0 - 1, None),
        "ONE_CLASS": (labels * 0, None),
        "NAMED": (labels % 2, ["x", "y"]),
        "OTHER_NAMES": (labels % 2, ["x", "z"]),
        "MORE_CLASSES": (labels + 2, None),
        "NINE": (labels % 2, None),
    }
    for name in set(settings) & set(files):
        file_labels, class_names = files[name]
        num = 9 if name == "NINE" else len(images)
        _write(tmp_path / f"{name.lower()}.beton", images[:num], file_labels[:num], class_names)
    arguments = [str(tmp_path / f"{word.lower()}.beton") if word in files else word for word in settings]
    assert main(["eval", str(run_folder), *arguments]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("fastssl: error")
    for part in parts:
        assert part in line
    assert not (run_folder / "eval.jsonl").exists()
    assert not (run_folder / "features").exists()  # refused before the work


def test_a_line_has_what_a_repetition_needs(run_folder):
    evaluate_run(run_folder, ["eval.knn_temperature=0.2"], what=["knn"])
    [line] = read_rows(run_folder / "eval.jsonl")
    assert line["overrides"] == ["eval.knn_temperature=0.2"]
    assert line["settings"]["knn_temperature"] == line["chosen"]["temperature"] == 0.2
    assert line["identity"]["weights_sha256"]
    assert line["environment"]["packages"]["torch"]
    assert json.loads(json.dumps(line)) == line


# --- in proportion


def _trained(folder: Path, seconds: float) -> None:
    """Rows of a training of 20 steps of 256 images."""
    rows = [{"kind": "epoch", "step": step, "epoch": 0, "img_per_s": 20 * 256 / seconds} for step in (10, 20)]
    rows.insert(1, {"kind": "held_out", "step": 10, "epoch": 0, "knn_top1": 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_baselines_are_evaluated_where_they_cost_little(run_folder, capsys):
    _trained(run_folder, 60.0)
    table = str(evaluate_run(run_folder, ["eval.baselines=null", "eval.what=[knn, linear]"]))
    found = [(line["encoder"], line["name"]) for line in _lines(run_folder, 6)]
    encoders = ("raw pixels", "untrained encoder", "pre-trained encoder")
    assert found == [(encoder, name) for encoder in encoders for name in ("knn", "linear")]
    assert "left out" not in table
    [line] = {json.dumps(line["plan"]) for line in _lines(run_folder, 6)}
    plan = json.loads(line)
    assert (plan["training_s"], plan["limit_s"], plan["left_out"]) == (60.0, 20.0, [])
    assert 0 < plan["expected_s"] < 20
    assert "left out" not in capsys.readouterr().err


def test_what_does_not_fit_into_a_fraction_of_the_training_is_left_out_and_named(run_folder, capsys):
    """A training whose images took 2 s each: a tenth of it is enough to fine-tune one encoder, not two."""
    _trained(run_folder, 5120 * 2.0)
    changes = ["eval.what=[knn, finetune]", "eval.baselines=null", "eval.knn_k=5", "eval.num_seeds=1"]
    changes += ["eval.finetune_lrs=[0.1]", "eval.finetune_epochs=1"]
    table = str(evaluate_run(run_folder, [*changes, "eval.time_fraction=0.1"]))
    found = [(line["encoder"], line["name"]) for line in _lines(run_folder, 4)]
    trained = [("pre-trained encoder", "knn"), ("pre-trained encoder", "finetune")]
    assert found == [("raw pixels", "knn"), ("untrained encoder", "knn"), *trained]
    err = capsys.readouterr().err
    assert "fastssl: the evaluation takes about 15 min" in err
    for text in (table, err):
        assert "left out, for an evaluation within 17 min" in text
        assert "untrained encoder by finetune (about 9 min)" in text
        assert "--set eval.time_fraction=0 eval.baselines=true" in text
    assert _lines(run_folder, 1)[0]["plan"]["left_out"] == [["untrained encoder", "finetune"]]


@pytest.mark.parametrize(
    ("changes", "what", "encoders", "is_all"),
    [
        ({"time_fraction": 0.0}, False, 3, True),
        ({"baselines": True}, True, 3, True),
        ({"baselines": False}, True, 1, True),
        ({"baselines": None}, True, 1, True),  # what is named runs, and nothing else fits
        ({"baselines": None}, False, 1, False),
    ],
)
def test_what_is_asked_for_is_planned_whatever_it_takes(changes, what, encoders, is_all, run_folder):
    """A training of a second per image, of 60 images: there is time for nothing."""
    cfg = RunFolder(run_folder).load_config(["eval.what=[knn, linear]", "eval.baselines=null"])
    cfg = replace(cfg, eval=replace(cfg.eval, **changes))
    train, test, _ = choose_parts(cfg.data)
    cpu, trained = torch.device("cpu"), (60.0, 60)
    plan = plan_evaluation(
        cfg, ["pre-trained encoder"], train, test, cpu, image_px=16, trained=trained, is_asked_for=what
    )
    assert len(plan.protocols) == encoders
    assert plan.protocols["pre-trained encoder"] == (["knn", "linear"] if is_all else ["knn"])
    assert (plan.left_out is None) == (not plan.record["left_out"])


def test_on_a_gpu_what_computes_on_the_cpu_has_to_fit(run_folder):
    cfg = RunFolder(run_folder).load_config(["eval.what=[knn, logistic, linear]", "eval.baselines=false"])
    train, test, _ = choose_parts(cfg.data)

    def plan(seconds):
        trained = seconds and (seconds, 60)
        gpu = torch.device("cuda")
        return plan_evaluation(cfg, ["a"], train, test, gpu, image_px=16, trained=trained, is_asked_for=False)

    short, long = plan(60.0), plan(0.6)
    assert short.protocols["a"] == ["knn", "linear"]  # encoding takes a sixth of a second per image
    assert short.record["left_out"] == [["a", "logistic"]]
    assert long.protocols["a"] == plan(None).protocols["a"] == ["knn", "logistic", "linear"]


def test_raw_pixels_that_do_not_fit_into_memory_are_named_without_a_limit_too(run_folder, monkeypatch, capsys):
    monkeypatch.setattr(plan_module, "MAX_RAW_BYTES", 0)
    changes = ["eval.what=[knn]", "eval.baselines=null", "eval.time_fraction=0"]
    table = evaluate_run(run_folder, changes)
    lines = _lines(run_folder, 2)
    assert [line["encoder"] for line in lines] == ["untrained encoder", "pre-trained encoder"]
    assert 0 < lines[0]["plan"]["expected_s"] < 20  # finite: the line is JSON
    assert lines[0]["plan"]["left_out"] == [["raw pixels", "knn"]]
    for text in (str(table), capsys.readouterr().err):
        assert "left out: raw pixels by knn (more memory than it is worth). All of it: --set eval.baselines=t" in text


def test_a_plan_needs_no_weights_of_others_and_has_the_size_of_the_training(run_folder, monkeypatch):
    cfg = RunFolder(run_folder).load_config()
    model = replace(cfg.model, backbone_kwargs=cfg.model.backbone_kwargs | {"pretrained": True})
    train, test, _ = choose_parts(cfg.data)
    built = []
    monkeypatch.setattr(plan_module, "build_backbone", lambda *args: built.append(args) or build_backbone(*args))
    for image_px in (16, 24):
        plan_evaluation(
            replace(cfg, model=model),
            ["a"],
            train,
            test,
            torch.device("cpu"),
            image_px=image_px,
            trained=None,
            is_asked_for=True,
        )
    assert built == [(cfg.model, 16), (cfg.model, 24)]


def test_test_images_that_are_training_images_are_said_and_recorded(run_folder, tmp_path, digits, capsys):
    path = str(digits / "train.beton")
    where = f"{path}; of these 1,297 images, 1,297 are copies of training images and 0 more look almost like one"
    table = evaluate_run(run_folder, [f"data.train={path}", f"data.test={path}"], what=["knn"])
    [line] = _lines(run_folder, 1)
    assert (line["scored_on"], line["duplicates"]) == (path, where)
    assert table.values["duplicates"] == where
    assert f"fastssl: {where}\n" in capsys.readouterr().err
    assert where in table.foot.splitlines()
    assert where not in table.head
    evaluate_run(run_folder, what=["knn"])  # files without hashes
    assert _lines(run_folder, 1)[0]["duplicates"] is None


def test_a_bounded_k_is_said_and_recorded(run_folder, capsys):
    evaluate_run(run_folder, ["eval.knn_k=500"], what=["knn"])
    assert "fastssl: kNN: k = 240 instead of 500: there are no more" in capsys.readouterr().err
    assert _lines(run_folder, 1)[0]["chosen"] == {"k": 240, "temperature": 0.1, "k_asked_for": 500}
    evaluate_run(run_folder, ["eval.knn_k=null"], what=["knn"])
    assert "k = 24 instead of 200: a class has that many" in capsys.readouterr().err


def test_progress_of_every_part_is_on_stderr(run_folder, monkeypatch, capsys):
    monkeypatch.setattr("pipelines.progress.LINE_EVERY_S", 0.0)
    evaluate_run(run_folder, ["eval.num_seeds=1", "eval.finetune_epochs=1"], what=ALL)
    out, err = capsys.readouterr()
    assert out == ""
    for what in ("features of train.beton", "knn", "linear", "logistic", "few_label", "linear_augmented", "finetune"):
        assert re.search(rf"^pre-trained encoder: {what}  [\d,]+/[\d,]+  [\d,]+ img/s  left ", err, re.MULTILINE), what
