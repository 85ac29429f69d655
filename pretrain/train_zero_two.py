"""Pre-train an encoder or a causal language model from text under ZeRO-2, which shards optimizer states and gradients
over the ranks, or with --zero3 under ZeRO-3, which shards the parameters too. Example:

python pretrain/train_zero_two.py --model_name hong --corpus_path sample_data/corpus --zero3 --auto_wrap
"""

from pretrain.run import start

if __name__ == "__main__":
    start("train_zero_two", __doc__)
