import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ds_dpo.errors import ConfigError
from ds_dpo.evaluation.run import prompt_sets
from ds_dpo.evaluation.run.prompt_sets import HPSV2_STYLES, KNOWN_SETS, Prompt, open_prompt_set, open_prompt_sets
from ds_dpo.miniature.world import TEST_PROMPTS


def opened(choice: object, said: list[str] | None = None) -> tuple[str, list[tuple[str, str | None]]]:
    found = open_prompt_set(str(choice), say=[].append if said is None else said.append)
    return found.name, [(prompt.text, prompt.category) for prompt in found.prompts]


def test_each_form_of_file_gives_prompts_with_their_categories(tmp_path: Path) -> None:
    a, b = ("a red cat", "animals"), ('a "blue" dog, lying', "colours")
    plain = [(text, None) for text, _ in (a, b)]
    files = {
        "a.txt": (f"{a[0]}\n\n  {b[0]}\n", plain),
        "b.jsonl": (
            "\n".join(json.dumps({"tag": tag, "prompt": text, "include": [{"class": "x"}]}) for text, tag in (a, b)),
            [a, b],
        ),
        "c.json": (json.dumps([text for text, _ in (a, b)]), plain),
        "d.json": (json.dumps([{"prompt": text, "metadata": {}} for text, _ in (a, b)]), plain),
        "e.json": (json.dumps({tag: [text] for text, tag in (a, b)}), [a, b]),
        "f.tsv": (
            f'Prompt\tCategory\tChallenge\tNote\n{a[0]}\t{a[1]}\tBasic\t\n{b[0]}\t{b[1]}\tBasic\tsays "x\n',
            [a, b],
        ),
        "g.csv": (f'caption,category\n{a[0]},{a[1]}\n"a ""blue"" dog, lying",{b[1]}\n', [a, b]),
    }
    for name, (content, wanted) in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert opened(tmp_path / name) == (name[0], wanted), name
    rows = {"text": [a[0], b[0]], "style": [a[1], b[1]], "image": [b"x", b"y"]}
    pq.write_table(pa.table(rows), tmp_path / "h.parquet")
    assert opened(tmp_path / "h.parquet") == ("h", [a, b])
    assert opened(f"mine={tmp_path / 'a.txt'}") == ("mine", plain)


def test_hpsv2_is_read_from_its_list_or_from_a_file_for_each_style(tmp_path: Path) -> None:
    texts = [f"{style} {number}" for style in HPSV2_STYLES for number in range(3)]
    wanted = [(text, text.split()[0]) for text in texts]
    (tmp_path / "list.json").write_text(json.dumps([{"prompt": text} for text in texts]))
    assert opened(f"hpsv2={tmp_path / 'list.json'}") == ("hpsv2", wanted)
    (tmp_path / "styles").mkdir()
    for style in HPSV2_STYLES:
        (tmp_path / "styles" / f"{style}.json").write_text(json.dumps([t for t in texts if t.startswith(style)]))
    assert opened(f"hpsv2={tmp_path / 'styles'}") == ("hpsv2", wanted)
    assert opened(tmp_path / "list.json")[1] == [(text, None) for text in texts]


def test_prompts_that_repeat_are_counted_named_and_evaluated_once(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\none\n one\nthree\ntwo\n")
    said: list[str] = []
    assert [text for text, _ in opened(tmp_path / "p.txt", said)[1]] == ["one", "two", "three"]
    assert said == ["p: 3 of 6 prompts repeat an earlier one and are left out: 'one', 'two'"]


def test_known_sets_come_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert opened("miniature") == ("miniature", [(text, None) for text in TEST_PROMPTS])
    for style in HPSV2_STYLES:
        (tmp_path / f"{style}.json").write_text(json.dumps([f"{style} one"]))
    monkeypatch.setattr(prompt_sets, "_download", lambda repository, name: tmp_path / Path(name).name)
    assert opened("hpsv2") == ("hpsv2", [(f"{style} one", style) for style in HPSV2_STYLES])
    with pytest.raises(ConfigError, match=r"--prompts geneval: is published as a file .*give geneval=FILE"):
        opened("geneval")


def test_a_hub_that_cannot_be_reached_is_named_with_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("hpsv2", "parti"):
        with pytest.raises(ConfigError, match=rf"--prompts {name}: the hub does not provide .*; or give {name}=FILE"):
            open_prompt_set(name, say=print)
    assert all(known.source for known in KNOWN_SETS.values())


def test_what_is_no_set_of_prompts_is_refused_by_name(tmp_path: Path) -> None:
    cases = {
        "empty.txt": ("\n \n", "empty.txt: has no prompt"),
        "empty.json": ("[]", "empty.json: has no prompt"),
        "blank.json": ('[" "]', "blank.json: has no prompt"),
        "torn.json": ("[", "torn.json: not JSON"),
        "number.json": ("[1]", "number.json, entry 1: 1: has no text named prompt"),
        "nested.json": ('{"a": {"b": 1}}', "nested.json: {'b': 1}: must be a list of prompts"),
        "seed.jsonl": ('{"prompt": "a", "seed": 7}', r"seed.jsonl, line 1: states seed 7, .*--first_seed"),
        "names.csv": ("a,b\n1,2\n", "names.csv, row 1: .*has no text named prompt"),
        "torn.parquet": ("PAR1", "torn.parquet: cannot be read as parquet"),
        "other.png": ("x", "other.png: .png; give one of .txt"),
        "bytes.txt": (b"\xff\xfe\xff", "bytes.txt: cannot be read"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ConfigError, match=message):
            open_prompt_set(str(tmp_path / name), say=print)
    with pytest.raises(ConfigError, match=r"--prompts nothing: no such file, and no known set; .*parti"):
        open_prompt_set("nothing", say=print)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"--prompts: two sets have the name a; .*mine=FILE"):
        open_prompt_sets([str(tmp_path / "a.txt"), f"a={tmp_path / 'a.txt'}"], say=print)


def test_the_digest_of_a_set_changes_with_prompts_and_their_order() -> None:
    one = prompt_sets.PromptSet("a", (Prompt("x"), Prompt("y")))
    assert one.sha256 == prompt_sets.PromptSet("b", (Prompt("x", "c"), Prompt("y"))).sha256
    assert one.sha256 != prompt_sets.PromptSet("a", (Prompt("y"), Prompt("x"))).sha256
