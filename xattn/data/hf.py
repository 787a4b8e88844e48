"""Documents of Hugging Face's ``datasets``, from the hub or from a local folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from xattn.data.config import HFConfig
from xattn.data.documents import PIECE_BYTES, PIECE_ROWS, Block, Chunk, Files, document_blocks, optional, some_names
from xattn.data.finding import sha256_of_files
from xattn.errors import BadInput, first_line


class HFDataset:
    """A dataset of Hugging Face's ``datasets``, from the hub or from a local folder."""

    def __init__(self, config: HFConfig):
        self._config = config
        self._name = f"data.dataset = {config.dataset!r}"
        self._dataset = self._open()

    def pieces(self) -> list[Chunk]:
        limit = self._config.max_documents
        if self._config.streaming:
            return [Chunk("", 0, -1 if limit is None else limit, 0)]
        rows = len(self._dataset) if limit is None else min(limit, len(self._dataset))
        return [Chunk("", i, min(i + PIECE_ROWS, rows), PIECE_BYTES) for i in range(0, rows, PIECE_ROWS)]

    def read(self, piece: Chunk) -> Iterator[Block]:
        field = self._config.field
        if self._config.streaming:
            values = (row[field] for row in self._dataset)
        else:
            starts = range(piece.start, piece.end, 1000)
            values = (value for i in starts for value in self._dataset[i : min(i + 1000, piece.end)][field])
        for number, value in enumerate(values, piece.start):
            if number == piece.end:
                return
            if not isinstance(value, str):
                raise BadInput(f"{self._name}: row {number}: {field!r} is not a string")
            yield from document_blocks(value)

    def sha256(self) -> str:
        """Hash the dataset's own files and the selection from them. A stream from the hub can't be hashed before it is
        read, so what names it is hashed instead."""
        config, folder = self._config, Path(os.path.expanduser(self._config.dataset))
        named = [config.field, config.max_documents, config.subset, config.split]
        if config.streaming and not folder.is_dir():
            named += [config.dataset, config.revision]
        elif config.streaming:
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            named += [self._sha256_of(files)]
        elif self._dataset.cache_files:
            files = [Path(f["filename"]) for f in self._dataset.cache_files]
            named += [len(self._dataset), self._sha256_of(files)]
        else:
            named += [self._dataset._fingerprint]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()

    @staticmethod
    def _sha256_of(files: Sequence[Path]) -> str:
        digests = sha256_of_files([*map(str, files)], "data.dataset")
        return hashlib.sha256(json.dumps(["text", digests]).encode()).hexdigest()

    def _open(self) -> Any:
        datasets, config = optional("datasets", "data=hf"), self._config
        datasets.disable_progress_bars()
        folder = Path(os.path.expanduser(config.dataset))
        saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
        try:
            if saved:
                opened = datasets.load_from_disk(str(folder))
                if isinstance(opened, datasets.DatasetDict):
                    if config.split not in opened:
                        raise BadInput(f"data.split = {config.split!r}: no such split; allowed: {', '.join(opened)}")
                    opened = opened[config.split]
                elif config.split != "train":
                    raise BadInput(f"data.split = {config.split!r}: {folder} has no splits; leave it out")
                for key in ("subset", "revision"):
                    if getattr(config, key) is not None:
                        raise BadInput(f"data.{key}: {folder} was written by save_to_disk and has none; leave it out")
                if config.streaming:
                    opened = opened.to_iterable_dataset()
            else:
                opened = datasets.load_dataset(
                    str(folder) if folder.exists() else config.dataset,
                    config.subset,
                    split=config.split,
                    revision=config.revision,
                    streaming=config.streaming,
                )
        except BadInput:
            raise
        except Exception as error:  # the library, its builders and the network raise many kinds
            raise BadInput(f"{self._name}: {type(error).__name__}: {first_line(error)}") from error
        names = opened.column_names or list(next(iter(opened), {}))
        if config.field not in names:
            raise BadInput(
                f"{self._name}: no column {config.field!r}; choose one of {some_names(names)} with data.field"
            )
        return opened


Source = Files | HFDataset
"""What a corpus is read from."""
