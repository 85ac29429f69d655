"""Pre-train an encoder or a causal language model: one process, or DDP for several; DeepSpeed with --deepspeed_config.

python pretrain/train.py --model_name hong --model transformer --corpus_path corpus/
"""

from pretrain.run import start

if __name__ == "__main__":
    start("train")
