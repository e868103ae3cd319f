"""A real embedded engine behind a router that interrupts it, as a weight update would."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.types import GenerateRequest, Generation, Status


@dataclass
class InterruptingRouter:
    """Ends the n-th request after `pieces[n]` tokens, where there is such a piece; the version
    goes up with every interruption."""

    engine: EmbeddedEngine
    pieces: Sequence[int] = ()
    version: int = 0
    requests: list[GenerateRequest] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    async def generate(self, request: GenerateRequest, key: str = "") -> list[Generation]:
        number = len(self.requests)
        self.requests.append(request)
        self.keys.append(key)
        piece = self.pieces[number] if number < len(self.pieces) else None
        versions = [(0, self.version)]
        if piece is not None:
            self.version += 1
        if piece == 0:  # what an engine answers for a request that still waited
            return [Generation([], [], Status.ABORTED, versions, error="Aborted")]
        is_interrupted = piece is not None and piece < request.max_new_tokens
        if is_interrupted:
            request = replace(request, max_new_tokens=piece)
        [generation] = await self.engine.generate(request)
        if generation.status is Status.ERROR:
            return [generation]
        if is_interrupted and generation.status is Status.TRUNCATED:
            generation = replace(generation, status=Status.ABORTED, error="Aborted")
        return [replace(generation, versions=versions)]
