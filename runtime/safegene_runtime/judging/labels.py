"""The labels of a record, held against the judge that made them."""

from __future__ import annotations

from safegene_runtime.errors import Problem, RecordError
from safegene_runtime.judging.judge import Judge, check_same_judge, label_all
from safegene_runtime.record.reference import Reference

__all__ = ["check_labels"]


def check_labels(record: Reference, judge: Judge) -> None:
    """The record was labelled by this judge, and still says what it said then.

    Raises:
        RecordError: another judge, or edited labels.
    """
    check_same_judge(record.meta["judge"], judge, str(record.path))
    texts = [prompt.text for prompt in record.prompts]
    for arm in ("ref", "base"):
        recorded = [getattr(prompt, f"{arm}_label") for prompt in record.prompts]
        again = label_all(judge, [getattr(p, f"{arm}_text") for p in record.prompts], texts)
        wrong = [p.id for p, old, new in zip(record.prompts, recorded, again, strict=True)
                 if old != str(new)]  # fmt: skip
        if wrong:
            raise RecordError(
                Problem(
                    str(record.path),
                    f"{arm}_verdict",
                    "what the judge says of the recorded replies",
                    f"another label for {', '.join(wrong[:5])}",
                    "the reference was edited: record it again",
                )
            )
