"""Prompts -> embeddings, each prompt encoded once: kept in memory, and in a folder that workers and runs share."""

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rlalign.files import in_words, write_atomically
from rlalign.models.embeddings import Embeddings, fingerprint
from rlalign.policy import Policy
from rlalign.prompts import seen_by_model
from rlalign.types import Encoded, Prompt

logger = logging.getLogger(__name__)

MAX_PROMPTS = 4096
MAX_BYTES = 2 * 2**30
"""Of CPU memory. A prompt of FLUX and its negative are 8 MiB in bfloat16, so 256 of them; of SD3, 1,500."""

Key = tuple[str, ...]


class Encoder:
    """The policy's text encoders behind what they were asked before, unless one of them trains."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.kept: OrderedDict[Key, Encoded] = OrderedDict()
        self.num_bytes = 0  # of ``kept``
        self.store = Store(policy.embeddings) if policy.embeddings else None

    def __call__(self, prompts: Sequence[Prompt]) -> list[Encoded]:
        """On the policy's device; the text encoders stay where they are when all prompts are known."""
        if self.policy.trains_encoder:
            return self.policy.encode(prompts)
        keys = [seen_by_model(prompt) for prompt in prompts]
        found = {key: encoded for key in dict.fromkeys(keys) if (encoded := self._known(key)) is not None}
        fresh = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in found}
        if fresh:
            for key, encoded in zip(fresh, self.policy.encode([*fresh.values()]), strict=True):
                found[key] = _moved(encoded, "cpu")
                if self.store:
                    self.store.write(key, found[key])
        for key, encoded in found.items():
            self._keep(key, encoded)
        return [_moved(found[key], self.policy.device) for key in keys]

    def _known(self, key: Key) -> Encoded | None:
        return self.kept.get(key) or (self.store.read(key) if self.store else None)

    def _keep(self, key: Key, encoded: Encoded) -> None:
        """Forgets those that were not asked for longest, as far as there is no room."""
        if key not in self.kept:
            self.num_bytes += _num_bytes(encoded)
        self.kept[key] = encoded
        self.kept.move_to_end(key)
        while len(self.kept) > MAX_PROMPTS or (self.num_bytes > MAX_BYTES and len(self.kept) > 1):
            self.num_bytes -= _num_bytes(self.kept.popitem(last=False)[1])


class Store:
    """One safetensors file a prompt, named by a hash of all that its numbers depend on. Any number may use it at once.

    Files appear whole, and two writers write the same bytes. What was damaged later is named and made again.
    """

    def __init__(self, embeddings: Embeddings) -> None:
        self.folder, self.identity = embeddings.folder, embeddings.identity
        with in_words(f"write into {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)

    def read(self, key: Key) -> Encoded | None:
        """On the CPU; None where there is none that is sound."""
        path, about = self._place(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                names: list[str] = file.keys()
                metadata, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in names}
        except (SafetensorError, OSError) as error:
            metadata, tensors = {"about": str(error)}, dict[str, Tensor]()
        if metadata != {"about": about, "fingerprint": fingerprint(tensors)}:
            logger.warning("the embedding %s is damaged, and is made again", path)
            return None
        cond, uncond = (
            {name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.startswith(start)}
            for start in ("cond/", "uncond/")
        )
        return cond, uncond or None

    def write(self, key: Key, encoded: Encoded) -> None:
        path, about = self._place(key)
        halves = zip(("cond", "uncond"), encoded, strict=True)
        tensors = {  # copies, since a file has no place for an image that both halves share
            f"{half}/{name}": tensor.clone(memory_format=torch.contiguous_format)
            for half, cond in halves
            for name, tensor in (cond or {}).items()
        }
        write_atomically(path, save(tensors, {"about": about, "fingerprint": fingerprint(tensors)}))

    def _place(self, key: Key) -> tuple[Path, str]:
        about = json.dumps([self.identity, *key])
        return self.folder / f"{hashlib.sha256(about.encode()).hexdigest()}.safetensors", about


def _tensors(encoded: Encoded) -> Iterable[Tensor]:
    cond, uncond = encoded
    return [*cond.values(), *(uncond or {}).values()]


def _num_bytes(encoded: Encoded) -> int:
    return sum(tensor.nbytes for tensor in _tensors(encoded))


def _moved(encoded: Encoded, device: torch.device | str) -> Encoded:
    cond, uncond = (None if half is None else {name: t.to(device) for name, t in half.items()} for half in encoded)
    assert cond is not None
    return cond, uncond
