"""Every key of the schema with its type, unit and meaning, and the nearest one to a misspelt key.

A key is a dotted path (`optim.lr`). Under a mapping the schema cannot know the names, so the pattern holds
a star: `data.sources.*.weight`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from phsa_megatron.config import (
    schema,
    schema_attention,
    schema_cluster,
    schema_compute,
    schema_health,
    schema_monitoring,
)

_UNITS = {
    "tokens": "tokens",
    "steps": "steps",
    "sequences": "sequences",
    "gib": "GiB",
    "tflops": "TFLOP/s",
    "frac": "fraction, 0 to 1",
    "dir": "folder",
    "file": "file",
    "prefix": "path prefix",
    "size": "count",
    "topk": "blocks",
    "s": "seconds",
    "c": "degrees Celsius",
}
_UNIT_BY_KEY = {
    # Names that a suffix would explain wrongly.
    "model.hidden_size": "channels",
    "model.ffn_hidden_size": "channels",
    "model.head_dim": "channels",
    "model.vocab_size": "tokens",
    "model.vocab_pad_multiple": "tokens",
    "parallel.tensor_size": "processes",
    "parallel.pipeline_size": "stages",
    "parallel.virtual_pipeline_size": "chunks per stage",
    "parallel.context_size": "processes",
    "parallel.context_node_size": "processes",
    "parallel.expert_size": "processes",
    "model.expert_topk": "experts",
    "optim.adam_eps": "none",
    "cluster.processes_per_node": "processes",
    "health.min_write_mib_per_s": "MiB/s",
    "cluster.gpus_per_node": "GPUs",
    "cluster.max_failures_without_progress": "failures",
    "cluster.chain": "jobs",
    "cluster.environment.*": "none",
    "cluster.sbatch.*": "none",
}
_OTHER_NAMES = {
    # What the same thing is called elsewhere, where letters alone would not find it.
    "learning_rate": "optim.lr",
    "batch_size": "optim.global_batch_sequences",
    "global_batch_size": "optim.global_batch_sequences",
    "micro_batch_size": "optim.micro_batch_sequences",
    "seq_length": "data.seq_len_tokens",
    "max_steps": "run.train_steps",
    "train_iters": "run.train_steps",
    "tp": "parallel.tensor_size",
    "pp": "parallel.pipeline_size",
    "vpp": "parallel.virtual_pipeline_size",
    "cp": "parallel.context_size",
    "k": "attention.train_topk",
    "lambda": "attention.mean_weight_frac",
    "rope_theta": "model.rope_base",
    "nodes": "cluster.num_nodes",
    "walltime": "cluster.time_limit",
    "env": "cluster.environment",
    "max_retries": "cluster.max_failures_without_progress",
}


@dataclass(frozen=True)
class Field:
    """One setting of the schema.

    Attributes:
        key: dotted path, with a star for the names of a mapping.
        annotation: the Python type.
        default: value when nobody sets it; `???` if somebody must.
        meaning: the docstring under the field.
    """

    key: str
    annotation: Any
    default: Any
    meaning: str

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return isinstance(self.default, str) and self.default == MISSING

    @property
    def optional(self) -> bool:
        """Whether null is allowed."""
        return type(None) in get_args(self.annotation)

    @property
    def plain_type(self) -> Any:
        """The type without `| None`; the first one where several are allowed."""
        if get_origin(self.annotation) in (Union, types.UnionType):
            return next(a for a in get_args(self.annotation) if a is not type(None))
        return self.annotation

    @property
    def choices(self) -> list[str]:
        """The allowed names of an enumeration, else nothing."""
        plain = self.plain_type
        return [m.name for m in plain] if isinstance(plain, type) and issubclass(plain, Enum) else []

    @property
    def expected(self) -> str:
        """The type in words, for messages."""
        if self.choices:
            words = "one of " + ", ".join(self.choices)
        elif self.plain_type == list[str]:
            words = "a list of texts, like [a,b]"
        elif self.plain_type == list[int]:
            words = "a list of whole numbers, like [1,2]"
        elif get_origin(self.plain_type) is dict:
            words = "a mapping of names to settings"
        elif bool in get_args(self.annotation) and str in get_args(self.annotation):
            words = "a text, a whole number, true or false"
        else:
            words = {
                int: "a whole number",
                float: "a number",
                bool: "true or false",
                str: "a text",
            }[self.plain_type]
        return words + (" or null" if self.optional else "")

    @property
    def unit(self) -> str:
        """The unit, from the last word of the name; 'none' where a value has no unit."""
        if self.key in _UNIT_BY_KEY:
            return _UNIT_BY_KEY[self.key]
        name = self.key.rsplit(".", 1)[-1]
        if "num_" in name:
            return "count"
        return _UNITS.get(name.rsplit("_", 1)[-1], "none")


@cache
def fields() -> dict[str, Field]:
    """Return all settings by key pattern, in the order of the schema."""
    return {field.key: field for field in _walk(schema.TrainConfig, "")}


@cache
def groups() -> dict[str, str]:
    """Return the keys that hold other keys (`optim`, `data.sources.*`), with their meaning."""
    return {key: _docs()[cls.__name__][""] for key, cls in _walk_groups(schema.TrainConfig, "")}


def find(key: str) -> Field | None:
    """Return the setting that a key names, or None; names of a mapping match its star."""
    known = fields()
    return known.get(key) or next((f for f in known.values() if _matches(f.key, key)), None)


def find_group(key: str) -> str | None:
    """Return the pattern of the group that a key names, or None."""
    return next((group for group in groups() if _matches(group, key)), None)


def keys_under(group: str) -> list[str]:
    """Return the patterns of all settings below a group."""
    return [key for key in fields() if key.startswith(group + ".")]


def nearest(name: str, candidates: list[str], count: int = 3) -> list[str]:
    """Return the candidates that a person may have meant, best first."""

    def ratio(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio()

    def score(candidate: str) -> float:
        whole = ratio(name, candidate)
        last = ratio(name.rsplit(".", 1)[-1], candidate.rsplit(".", 1)[-1])
        # A right last word in the wrong group counts; the whole path breaks ties (`model.name`, `run.name`).
        return max(whole, last) + 0.2 * whole

    scored = sorted(((score(c), c) for c in candidates), key=lambda pair: -pair[0])
    good = [pair for pair in scored if pair[0] >= max(0.66, scored[0][0] - 0.15)]
    return [candidate for _, candidate in good[:count]]


def did_you_mean(name: str, candidates: list[str]) -> str:
    """Return ' Did you mean X?' or an empty text when nothing is near."""
    near = nearest(name, candidates, count=2)
    return " Did you mean " + " or ".join(near) + "?" if near else ""


def suggest_key(key: str) -> str:
    """Return ' Did you mean X?' for a key that the schema lacks."""
    alias = _OTHER_NAMES.get(key.rsplit(".", 1)[-1])
    if alias is not None:
        return f" Did you mean {alias}?"
    parts = key.split(".")
    name = parts[2] if parts[:2] == ["data", "sources"] and len(parts) > 2 else "NAME"
    candidates = [k.replace("*", name) for k in [*fields(), *groups()]]
    return did_you_mean(key, candidates)


def _matches(pattern: str, key: str) -> bool:
    want, have = pattern.split("."), key.split(".")
    return len(want) == len(have) and all(w in ("*", h) for w, h in zip(want, have, strict=True))


def _value_class(annotation: Any) -> type | None:
    """Return the dataclass that a mapping's values are, or None."""
    arguments = get_args(annotation)
    if get_origin(annotation) is dict and dataclasses.is_dataclass(arguments[1]):
        return arguments[1] if isinstance(arguments[1], type) else None
    return None


def _walk(cls: type, prefix: str) -> Iterator[Field]:
    hints = get_type_hints(cls)
    for item in dataclasses.fields(cls):
        key, annotation = prefix + item.name, hints[item.name]
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            yield from _walk(annotation, key + ".")
            continue
        factory = item.default_factory
        default = item.default if factory is dataclasses.MISSING else factory()
        yield Field(key, annotation, default, _docs()[cls.__name__].get(item.name, ""))
        value_class = _value_class(annotation)
        if value_class is not None:
            yield from _walk(value_class, key + ".*.")
        elif get_origin(annotation) is dict:
            # A mapping of plain values: any name may be set, and its meaning is that of the mapping.
            yield Field(key + ".*", get_args(annotation)[1], None, _docs()[cls.__name__].get(item.name, ""))


def _walk_groups(cls: type, prefix: str) -> Iterator[tuple[str, type]]:
    hints = get_type_hints(cls)
    for item in dataclasses.fields(cls):
        key, annotation = prefix + item.name, hints[item.name]
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            yield key, annotation
            yield from _walk_groups(annotation, key + ".")
            continue
        value_class = _value_class(annotation)
        if value_class is not None:
            yield key + ".*", value_class


@cache
def _docs() -> dict[str, dict[str, str]]:
    """Return the docstring under each field, by class and field; the empty name is the class's own."""
    docs: dict[str, dict[str, str]] = {}
    sources = (
        ast.parse(inspect.getsource(module))
        for module in (
            schema_cluster,
            schema,
            schema_attention,
            schema_compute,
            schema_health,
            schema_monitoring,
        )
    )
    for node in (statement for source in sources for statement in source.body):
        if not isinstance(node, ast.ClassDef):
            continue
        docs[node.name] = {"": ast.get_docstring(node) or ""}
        for statement, following in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                docs[node.name][statement.target.id] = " ".join(str(following.value.value).split())
    return docs
