"""An algorithm of a user's own: GRPO whose advantages are scaled by a knob of its own."""

from nanoslime.algorithms.grpo import GRPO


class Scaled(GRPO):
    def rollout_advantages(self, rewards):
        scale = self.config.options["scale"]
        return [scale * advantage for advantage in super().rollout_advantages(rewards)]


not_an_algorithm = len
