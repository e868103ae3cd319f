"""The engines that sample tokens. Each speaks the protocol `nanoslime.types.Engine`."""
