"""Pre-train an encoder or a causal language model from text under ZeRO-1: fairscale's OSS shards the optimizer states
over the ranks, ShardedDataParallel the reduction of the gradients. Example:

python pretrain/train_zero_one.py --model_name hong --corpus_path sample_data/corpus
"""

from pretrain.run import start

if __name__ == "__main__":
    start("train_zero_one", __doc__)
