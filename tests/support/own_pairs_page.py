"""The examples of docs/your_pairs.md: their code blocks, and the files that they speak of, made in a folder."""

import csv
import io
import json
import re

from pair_files import file_of, picture
from repository import ROOT

PAGE = ROOT / "docs" / "your_pairs.md"
BLOCK = re.compile(r"(?:^(?: {4}.*)?\n)+", re.MULTILINE)
COPIES = 40  # of each row that the page shows, with prompts of their own


def blocks(text):
    """The code blocks of a page, without their indent."""
    found = [re.sub(r"^ {4}", "", block, flags=re.MULTILINE).strip("\n") for block in BLOCK.findall(text)]
    return [block for block in found if block]


def examples(folder):
    """Blocks of each example by its heading; /data of the page is the folder."""
    sections = PAGE.read_text(encoding="utf-8").replace("/data/", f"{folder}/").split("\n## ")[1:]
    return {section.partition("\n")[0]: blocks(section.partition("\n")[2]) for section in sections}


def make_files(listing, folder):
    """Make the images of a listing, and return its first file, the one with the pairs."""
    pairs, *images = [line for line in listing.splitlines() if line != "..."]
    for number, name in enumerate(images):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file_of(picture(number, width=40, height=36)))
    return folder / pairs


def many_rows(block):
    """The text of a file whose rows are like those that the page shows."""
    lines = [line for line in block.splitlines() if line != "..."]
    if lines[0].startswith("{"):
        entries = [json.loads(line) for line in lines]
        copies = [entry | {"prompt": f"{entry['prompt']}, {n}"} for n in range(COPIES) for entry in entries]
        return "".join(json.dumps(entry) + "\n" for entry in copies)
    header, *rows = csv.reader(lines)
    file = io.StringIO()
    copies = [[f"{prompt}, {n}", *values] for n in range(COPIES) for prompt, *values in rows]
    csv.writer(file).writerows([header, *copies])
    return file.getvalue()


def make_example(name, folder):
    """Make an example's files as the page says, and return the path of its YAML file."""
    listing, rows, *programs, settings = examples(folder)[name]
    make_files(listing, folder).write_text(many_rows(rows))
    for program in programs:
        exec(compile(program, PAGE.name, "exec"), {})
    path = folder / settings.splitlines()[0].removeprefix("# ")
    path.write_text(settings)
    return path
