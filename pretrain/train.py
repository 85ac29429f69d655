"""Pre-train an encoder or a causal language model from text. Shards nothing: one process, or DDP for several; with
--deepspeed_config DeepSpeed shards as its JSON says (ZeRO-1, 2, 3). Example:

python pretrain/train.py --model_name hong --model transformer --corpus_path sample_data/corpus
"""

from pretrain.run import start

if __name__ == "__main__":
    start("train", __doc__)
