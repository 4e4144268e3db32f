"""A small encoder of sentences, trained from scratch by the Trainer of sentence-transformers."""

# /// script
# dependencies = ["sentence-transformers", "datasets", "accelerate"]
#
# [tool.field]
# title = "sentence-transformers, ranking loss"
# command = ["{python}", "{file}", "{seed}"]
# environment = { HF_HUB_OFFLINE = "1", WANDB_MODE = "disabled", TOKENIZERS_PARALLELISM = "false" }
# result = "spearman ([-\\d.]+), train loss ([\\d.]+)"
# clock = "trained for ([\\d.]+) s"
# ///

import random
import sys
import time
from pathlib import Path

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.models import Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizerFast

TOPICS, WORDS_PER_TOPIC = 40, 25
PAIRS, BATCH, EPOCHS = 3_200, 32, 1


def make_sentence(topic: int, choose: random.Random) -> str:
    """Return some words, most of them of one topic."""
    words = []
    for _ in range(choose.randint(8, 24)):
        of = topic if choose.random() < 0.6 else choose.randrange(TOPICS)
        words.append(f"w{of}x{choose.randrange(WORDS_PER_TOPIC)}")
    return " ".join(words)


def make_encoder() -> SentenceTransformer:
    """Return an encoder with random weights, and a vocabulary of the topics' words."""
    words = [f"w{topic}x{word}" for topic in range(TOPICS) for word in range(WORDS_PER_TOPIC)]
    Path("encoder").mkdir(exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(
        "encoder"
    )
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=768,
    )
    BertModel(config).save_pretrained("encoder")
    words_to_vectors = Transformer("encoder", max_seq_length=64)
    return SentenceTransformer(
        modules=[words_to_vectors, Pooling(words_to_vectors.get_word_embedding_dimension())],
        device="cpu",
    )


def main() -> None:
    """Train, evaluate and save."""
    from transformers import set_seed

    seed = int(sys.argv[1])
    set_seed(seed)
    choose = random.Random(0)
    topics = [choose.randrange(TOPICS) for _ in range(PAIRS)]
    pairs = Dataset.from_dict(
        {
            "anchor": [make_sentence(topic, choose) for topic in topics],
            "positive": [make_sentence(topic, choose) for topic in topics],
        }
    )
    one, other = ([choose.randrange(TOPICS) for _ in range(400)] for _ in range(2))
    other = [a if choose.random() < 0.5 else b for a, b in zip(one, other, strict=True)]
    evaluator = EmbeddingSimilarityEvaluator(
        [make_sentence(topic, choose) for topic in one],
        [make_sentence(topic, choose) for topic in other],
        [float(a == b) for a, b in zip(one, other, strict=True)],
    )
    model = make_encoder()
    arguments = SentenceTransformerTrainingArguments(
        output_dir="trained",
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        learning_rate=2e-4,
        warmup_steps=10,
        eval_strategy="steps",
        eval_steps=50,
        save_strategy="epoch",
        logging_steps=25,
        report_to="none",
        seed=seed,
        use_cpu=True,
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=pairs,
        loss=MultipleNegativesRankingLoss(model),
        evaluator=evaluator,
    )
    start_s = time.perf_counter()
    trained = trainer.train()
    print(f"trained for {time.perf_counter() - start_s:.2f} s")
    score = evaluator(model)[evaluator.primary_metric]
    print(f"spearman {score:.5f}, train loss {trained.training_loss:.5f}")


if __name__ == "__main__":
    main()
