"""What an optimizer step reads, as lines for a person."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.data.batches import BatchReader


@dataclass(frozen=True)
class Line:
    """A line of text and the style that a terminal gives it."""

    text: str
    style: str = ""


def show_step(config: TrainConfig, step: int, num_rows: int) -> Iterator[Line]:
    """Yield the documents of an optimizer step, with the text that is trained on.

    Args:
        config: the run.
        step: number of the step, from 1.
        num_rows: how many sequences of the step to show at most.

    Raises:
        DataError: a source is missing or damaged.
    """
    reader = BatchReader(config, "train")
    batch_size = config.optim.global_batch_sequences
    first = (step - 1) * batch_size
    shown = min(num_rows, batch_size)
    yield Line(
        f"step {step}: sequences {reader.order.number(first):,} to "
        f"{reader.order.number(first + batch_size - 1):,} of {config.data.seq_len_tokens:,} "
        f"tokens; "
        f"showing {shown}. Order {reader.fingerprint[:16]}",
        "bold",
    )
    for at in range(first, first + shown):
        batch = reader.micro_batch(at, 1)
        number, sequence = reader.order.number(at), reader.order.sequence(at)
        ids = reader.order.tokens(sequence)
        targets = int(batch.loss_mask.sum())
        overflow = (
            f", {batch.num_overflow_tokens} tokens over the limit of documents"
            if (batch.num_overflow_tokens)
            else ""
        )
        yield Line("")
        yield Line(
            f"sequence {number:,}: source {sequence.source}, domain {sequence.domain}, "
            f"{targets} labels that count{overflow}",
            "bold cyan",
        )
        position = 0
        for piece in sequence.pieces:
            last = piece.first_token + piece.num_tokens
            length = int(reader.order.source(sequence.source).lengths[piece.document])
            yield Line(
                f"--- {sequence.source} document {piece.document}, tokens {piece.first_token} to {last - 1} "
                f"of {length}",
                "yellow",
            )
            yield Line(reader.order.tokenizer.decode(ids[position : position + piece.num_tokens].tolist()))
            position += piece.num_tokens
