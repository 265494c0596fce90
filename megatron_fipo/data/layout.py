"""The columns of a split's files that are read, and how they are read."""

from dataclasses import dataclass

from megatron_fipo.config import DataConfig


@dataclass(frozen=True)
class Layout:
    """The configuration of one split."""

    split: str
    """train or validation."""
    prompt: str
    answer: str | None
    """None: the rows have no right answer."""
    source: str
    answer_format: str
    answer_pattern: str | None
    prompt_template: str

    @classmethod
    def of(cls, config: DataConfig, split: str) -> "Layout":
        """Return the layout of train or validation. Validation's own columns replace the general ones."""
        columns, own = config.columns, config.validation_columns
        prompt, answer, source, kind = columns.prompt, columns.answer, columns.source, config.answer_format
        pattern = config.answer_pattern
        if split != "train":
            prompt, answer, source = own.prompt or prompt, own.answer or answer, own.source or source
            kind, pattern = own.answer_format or kind, own.answer_pattern or pattern
        return cls(split, prompt, answer, source, kind, pattern, config.prompt_template)
