"""Pre-train under ZeRO-2, or ZeRO-3 with --zero3: gradients (and parameters) are sharded too.

python pretrain/train_zero_two.py --model_name hong --corpus_path corpus/ --zero3 --auto_wrap
"""

from pretrain.run import start

if __name__ == "__main__":
    start("train_zero_two")
