"""KoZeRO: ZeRO-sharded training of Korean language models, with pause tokens."""

__version__ = "0.1.0"
