"""Pre-train under ZeRO-1: fairscale's OSS shards the optimizer states, ShardedDataParallel the reduction.

python pretrain/train_zero_one.py --model_name hong --corpus_path corpus/
"""

from pretrain.run import start

if __name__ == "__main__":
    start("train_zero_one")
