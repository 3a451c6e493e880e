"""What an evaluation draws and scores, and what it leaves."""

import csv
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from diffusers import UNet2DConditionModel
from PIL import Image
from small_evaluation import PROMPTS, Brightness, Judge, images_in, lines_in, run, write_prompts
from zero_checkpoint import save_run

from ds_dpo.errors import CheckpointError, ConfigError, ModelError
from ds_dpo.evaluation.results_file import load_results
from ds_dpo.export.consolidate import consolidate
from ds_dpo.export.request import Request as ExportRequest
from ds_dpo.storage.best_mark import BestMark, write_best_mark

pytestmark = pytest.mark.slow


def test_every_model_draws_the_same_prompts_and_seeds_and_is_compared(models, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bright, dark = Brightness("bright"), Brightness("dark", higher_is_better=False, record={"kind": "dark"})
    results = run(out, models, [write_prompts(tmp_path)], [bright, dark], first_seed=10)
    by_model = {label: [image for image in results.images if image.model == label] for label in models}
    for images in by_model.values():
        assert [(image.prompt, image.seed) for image in images] == [
            (0, 10),
            (0, 11),
            (1, 12),
            (1, 13),
            (2, 14),
            (2, 15),
        ]
    pixels = {image.path: np.asarray(Image.open(out / image.path)) for image in results.images}
    means = {label: [float(pixels[image.path].mean()) for image in images] for label, images in by_model.items()}
    assert [image.scores["bright"] for image in by_model["one"]] == means["one"]
    assert (bright.rated, dark.rated) == (12, 12)
    # the figures by hand
    difference = np.array(means["two"]) - np.array(means["one"])
    wins = float(np.where(difference == 0, 0.5, difference > 0).mean())
    whole, opposite = (
        next(each for each in results.comparisons if each.category is None and each.scorer == name)
        for name in ("bright", "dark")
    )
    assert (whole.model, whole.against, whole.prompts, whole.n, whole.num_prompts) == ("two", "one", "few", 6, 3)
    assert whole.win_rate == pytest.approx(wins)
    assert whole.mean_difference == pytest.approx(difference.mean())
    assert opposite.win_rate == pytest.approx(1 - wins)
    assert opposite.mean_difference == pytest.approx(-difference.mean())
    assert whole.adjusted_p_value == pytest.approx(min(1, 2 * whole.p_value))
    # what is written says the same
    summary = json.loads((out / "summary.json").read_text())
    assert summary["comparisons"] == [asdict(each) for each in results.comparisons]
    assert summary["models"]["two"]["step"] == 7
    assert summary["models"]["one"]["scores"]["bright"]["mean"] == pytest.approx(np.mean(means["one"]))
    rows = list(csv.DictReader((out / "summary.csv").open()))
    assert [row["scorer"] for row in rows] == ["bright", "dark"]
    assert float(rows[0]["win_rate"]) == whole.win_rate
    assert "| two | one | few | bright | 6 |" in (out / "summary.md").read_text()
    assert load_results(out).images == results.images
    assert (out / "page.html").is_file()
    assert [path.name.startswith("events") for path in (out / "tensorboard").iterdir()] == [True]


def test_nothing_is_drawn_or_scored_twice_and_more_can_be_added(models, tmp_path: Path) -> None:
    out, few = tmp_path / "out", write_prompts(tmp_path)
    bright = Brightness("bright")
    run(out, {"one": models["one"]}, [few], [bright])
    first = {path: path.stat().st_mtime_ns for path in (out / "images").rglob("*.png")}
    assert (len(first), bright.rated) == (6, 6)
    # a second model
    run(out, models, [few], [bright])
    assert (len(images_in(out)), bright.rated) == (12, 12)
    # a second scorer, a judge, and a set of prompts, some of them those of the first
    more = write_prompts(tmp_path, "more", (PROMPTS[0], "a cyan circle on a gray background"))
    dark, judge = Brightness("dark", record={"kind": "dark"}), Judge("judge")
    results = run(out, models, [few, more], [bright, dark, judge])
    assert len(images_in(out)) == 20
    # the images of the prompt that both sets have are equal, and so have one score
    assert bright.rated == 12 + 4
    assert dark.rated == 16
    assert judge.asked == 2 * 8
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert len(lines_in(out / "images")) == 20
    assert {each.prompts for each in results.comparisons} == {"few", "more", "all"}
    again = run(out, models, [few, more], [bright, dark, judge])
    assert (bright.rated, dark.rated, judge.asked) == (16, 16, 16)
    assert again == results


def test_settings_of_a_folder_hold_and_others_are_refused_by_name_and_value(models, tmp_path: Path) -> None:
    out, few = tmp_path / "out", write_prompts(tmp_path)
    one = {"one": models["one"]}
    run(out, one, [few], [Brightness("bright")], steps=2)
    kept = run(out, one, [few], [Brightness("bright")], steps=None, seeds=None, batch=None, guidance=None)
    assert (kept.settings["steps"], kept.settings["seeds"], kept.settings["batch"]) == (2, 2, 2)
    with pytest.raises(ConfigError, match=r"--steps 3, but 2 was used; .*another folder"):
        run(out, one, [few], [Brightness("bright")], steps=3)
    with pytest.raises(ConfigError, match=r"--guidance 2\.0, but 1\.0 was used; --scheduler euler, but model was used"):
        run(out, one, [few], [Brightness("bright")], steps=2, guidance=2.0, scheduler="euler")
    write_prompts(tmp_path, "few", PROMPTS[:2])
    with pytest.raises(ConfigError, match=r"prompt set few: 2 prompts, but other ones were used \(3\)"):
        run(out, one, [few], [Brightness("bright")], steps=2)


def test_what_is_lost_is_named_and_done_again(models, tmp_path: Path) -> None:
    out, few = tmp_path / "out", write_prompts(tmp_path)
    bright, said = Brightness("bright"), []
    whole = run(out, models, [few], [bright])
    images = images_in(out)
    missing, damaged = (out / whole.images[0].path, out / whole.images[4].path)
    missing.unlink()
    damaged.write_bytes(damaged.read_bytes()[:100])
    (scores,) = (out / "scores").glob("*/rank_00000.jsonl")
    scores.write_bytes(scores.read_bytes()[:-5])
    assert run(out, models, [few], [bright], say=said.append) == whole
    assert images_in(out) == images
    assert any(f"2 image(s) are missing or damaged and are drawn again; the first: {missing}" in line for line in said)
    assert any(f"{scores}: its last line is torn" in line for line in said)
    assert "bright: gave 2 of 12 scores" in "\n".join(said)
    # a line in the middle
    text = scores.read_text().splitlines()
    scores.write_text("\n".join(["nonsense", '{"image": 1}', *text[2:]]) + "\n")
    assert run(out, models, [few], [bright], say=said.append) == whole
    assert any(f"{scores}: 2 line(s) cannot be read" in line for line in said)


def test_an_image_without_a_number_is_counted_named_and_left_out(models, tmp_path: Path) -> None:
    out, few = tmp_path / "out", write_prompts(tmp_path)
    results = run(out, models, [few], [Brightness("bright", nan_for=PROMPTS[:1]), Brightness("sure", record={"k": 2})])
    by_scorer = {each.scorer: each for each in results.comparisons if each.category is None}
    assert (by_scorer["bright"].n, by_scorer["sure"].n) == (4, 6)
    first = results.images[0].path
    words = f"bright gave no number for 4 of 12 images, which its comparisons leave out; the first: {first}"
    assert words in results.warnings
    json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)
    # asked again, since what failed may be a server
    sound = Brightness("bright")
    assert run(out, models, [few], [sound]).comparisons[0].n == 6
    assert sound.rated == 4


def test_a_judge_sees_both_orders_and_gives_a_win_rate(models, tmp_path: Path) -> None:
    judge = Judge("judge")
    results = run(tmp_path / "out", models, [write_prompts(tmp_path)], [judge, Brightness("bright")])
    assert judge.asked == 12
    own = [image for image in results.images if image.model == "two"]
    rivals = [image for image in results.images if image.model == "one"]
    for image, rival in zip(own, rivals, strict=True):
        brighter = np.sign(image.scores["bright"] - rival.scores["bright"])
        # what it adds for the first place cancels
        assert image.scores["judge"] == pytest.approx(0.5 + 0.3 * brighter)
        assert rival.scores["judge"] == 0.5
    by_scorer = {each.scorer: each for each in results.comparisons if each.category is None}
    assert by_scorer["judge"].win_rate == by_scorer["bright"].win_rate


def test_warnings_say_what_a_reader_must_know(models, tmp_path: Path) -> None:
    same = {"one": models["one"], "again": models["one"]}
    results = run(
        tmp_path / "a", same, [write_prompts(tmp_path)], [Brightness("bright")], trained_on=("bright", "other")
    )
    assert results.warnings == [
        "again draws exactly the same images as one: check that both are what they should be",
        "bright was trained on, and judges here: a model can learn to please it alone; trust a scorer that training "
        "did not use",
    ]
    assert results.comparisons[0].win_rate == 0.5


def test_a_changed_model_is_drawn_again_under_its_label(models, tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    few = write_prompts(tmp_path)
    folder.symlink_to(models["two"])
    before = run(out, {"one": models["one"], "mine": str(folder)}, [few], [Brightness("bright")])
    folder.unlink()
    folder.symlink_to(models["one"])
    bright = Brightness("bright")
    after = run(out, {"one": models["one"], "mine": str(folder)}, [few], [bright])
    assert after.comparisons[0].win_rate == 0.5 != before.comparisons[0].win_rate
    assert after.evaluation == before.evaluation
    assert bright.rated == 0  # the same images as those of one


def test_what_cannot_be_is_refused_before_anything_is_written(models, tmp_path: Path) -> None:
    few, out = write_prompts(tmp_path), tmp_path / "out"
    (tmp_path / "file").write_text("")
    one = {"one": models["one"]}
    cases = [
        ({"seeds": 0}, "--seeds 0"),
        ({"steps": 0}, "--steps 0"),
        ({"batch": -1}, "--batch -1"),
        ({"guidance": 0.5}, r"--guidance 0\.5"),
        ({"first_seed": -1}, "--first_seed -1"),
        ({"first_seed": 2**63 - 2}, "--first_seed"),
        ({"against": "two"}, "--against two: no model has this label; one would fit"),
        ({"device": "nonsense"}, "--device nonsense cannot be used"),
        ({"out": tmp_path / "file"}, "is a file"),
    ]
    for changes, message in cases:
        with pytest.raises(ConfigError, match=message):
            run(**{"out": out, "models": one, "prompts": [few], "scorers": [Brightness("bright")], **changes})
    for first_seed, split in ((999, "train"), (300_010, "test_unique")):
        with pytest.raises(ConfigError, match=f"pairs of {split}"):
            run(out, one, ["miniature"], [Brightness("bright")], first_seed=first_seed)
    with pytest.raises(ModelError, match="nowhere: no such folder"):
        run(out, {"one": "nowhere"}, [few], [Brightness("bright")])
    assert not out.exists()


def test_a_run_is_evaluated_at_its_newest_valid_checkpoint_or_a_step(model_folder, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(str(model_folder), subfolder="unet")
    weights = {name: weight.clone() for name, weight in unet.state_dict().items()}
    run_folder, out = tmp_path / "mine", tmp_path / "out"
    for steps in (2, 4, 6):
        weights["conv_out.weight"] = weights["conv_out.weight"] * 1.2
        save_run(run_folder, weights, base=model_folder, steps=steps, config=unet.config)
    newest = run_folder / "checkpoints" / "step_00000006" / "mp_rank_00_model_states.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    names = {"newest": str(run_folder), "second": f"{run_folder}@2", "again": f"{run_folder}/checkpoints/step_00000004"}
    exports: list[str] = []

    def export(checkpoint: Path, folder: Path, dtype: str) -> None:
        exports.append(checkpoint.name)
        consolidate(ExportRequest(source=checkpoint, out=folder, format="pipeline", dtype=dtype), say=[].append)

    said: list[str] = []
    few = write_prompts(tmp_path)
    results = run(out, names, [few], [Brightness("bright")], export=export, say=said.append)
    assert [(model.label, model.step) for model in results.models] == [("newest", 4), ("second", 2), ("again", 4)]
    assert [model.source for model in results.models] == list(names.values())
    assert any("skipped" in line and "step_00000006" in line for line in said)
    equal = [each.win_rate == 0.5 for each in results.comparisons if each.category is None]
    assert equal == [False, True]
    # it draws what its export draws
    exported = next((out / "models").glob("mine-step_00000002-*"))
    assert exports == ["step_00000004", "step_00000002"]
    alone = run(tmp_path / "alone", {"a": str(exported)}, [few], [Brightness("bright")])
    assert [image.sha256 for image in alone.images] == [i.sha256 for i in results.images if i.model == "second"]
    # nothing is exported twice, and what a kill left is cleared away
    torn = out / "models" / ".mine.host.1.partial"
    (torn / "unet").mkdir(parents=True)
    (out / "images" / ".a.png.host.1.partial").write_bytes(b"half")
    assert run(out, names, [few], [Brightness("bright")], export=export) == results
    assert len(exports) == 2
    assert [path for path in out.rglob(".*.partial")] == []
    write_best_mark(run_folder / "checkpoints", BestMark(metric="held_out.accuracy", step=2, value=0.7))
    run(out, {"best": f"{run_folder}@best"}, [few], [Brightness("bright")], export=export)
    assert len(exports) == 2
    with pytest.raises(CheckpointError, match=r"mine@3: has no checkpoint of step 3, only of \[2, 4, 6\]"):
        run(out, {"a": f"{run_folder}@3"}, [few], [Brightness("bright")], export=export)
