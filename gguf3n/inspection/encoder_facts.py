"""An mmproj file as inspect and lint see it: which encoders, which tensors they should have, which vision tower."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

from gguf.constants import Keys

from gguf3n.errors import MappingError
from gguf3n.formats.gguf_reader import GGUFFile, GGUFTensor
from gguf3n.gemma3n.mapping import Rule
from gguf3n.gemma3n.mmproj import (
    ARCH,
    AUDIO_PROJECTOR,
    TOWER,
    VISION_PROJECTOR,
    encoder_of,
    known_shapes,
    order_of_names,
)
from gguf3n.gemma3n.tower import Tower, read_tower

PROJECTORS = {"vision": VISION_PROJECTOR, "audio": AUDIO_PROJECTOR}
OWN_TENSORS = ("v.msfa.", "mm.a.hard_emb_norm.")
"""Beginnings of names that no other model's encoders have. Why not a.conv1d: Whisper's have it too."""


class EncoderFacts:
    """What follows from a file's keys and tensors, worked out when asked for."""

    def __init__(self, gguf: GGUFFile) -> None:
        self.gguf = gguf

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Which of Gemma 3n's encoders it says that it has, or has tensors of: "vision", "audio"; none for a file of
        another kind."""
        keys = self.gguf.keys

        def text(name: str) -> str | None:
            value = keys[name].value if name in keys else None
            return value if isinstance(value, str) else None

        if text(Keys.General.ARCHITECTURE) != ARCH:
            return ()
        common = text(Keys.Clip.PROJECTOR_TYPE)
        said = [
            kind for kind, projector in PROJECTORS.items() if projector in (common, text(f"clip.{kind}.projector_type"))
        ]
        if not said and not any(name.startswith(OWN_TENSORS) for name in self.gguf.tensors):
            return ()
        return tuple(kind for kind in PROJECTORS if kind in said or kind in self.there)

    @cached_property
    def there(self) -> tuple[str, ...]:
        """Which encoders have tensors, whatever the keys say."""
        found = {encoder_of(name) for name in self.gguf.tensors}
        return tuple(kind for kind in PROJECTORS if kind in found)

    @cached_property
    def _rules(self) -> tuple[dict[str, Rule], MappingError | None]:
        shapes = {name: tensor.shape for name, tensor in self.gguf.tensors.items()}
        try:
            return {rule.name(bid): rule for rule, bid in order_of_names(shapes, self.gguf.name)}, None
        except MappingError as error:
            return {}, error

    @property
    def rules(self) -> Mapping[str, Rule]:
        """Every tensor that the encoders have, as far as the tensors that are there tell."""
        return self._rules[0]

    @property
    def error(self) -> MappingError | None:
        """Why there are no rules: the tensors are of no vision tower like Gemma 3n's."""
        return self._rules[1]

    def known_tensors(self) -> Iterator[tuple[GGUFTensor, Rule]]:
        for name, rule in self.rules.items():
            if name in self.gguf.tensors:
                yield self.gguf.tensors[name], rule

    @cached_property
    def tower(self) -> Tower | None:
        """The vision tower; None where it is not there, or not all of it as it should be."""
        names = {name: rule for name, rule in self.rules.items() if rule.source.startswith(TOWER)}
        tensors = self.gguf.tensors
        if not names or any(
            name not in tensors or tensors[name].shape not in known_shapes(rule) for name, rule in names.items()
        ):
            return None
        return read_tower({name.removeprefix("v."): tensors[name].shape for name in names}, self.gguf.name)
