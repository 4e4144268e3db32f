"""A classifier of tables by pytorch-tabnet, with validation after each epoch."""

# /// script
# dependencies = ["pytorch-tabnet", "scikit-learn"]
#
# [tool.field]
# title = "pytorch-tabnet"
# command = ["{python}", "{file}", "{seed}"]
# result = 'test accuracy ([\d.]+), log loss ([\d.]+)'
# clock = 'fitted in ([\d.]+) s'
# ///

import sys
import time

from pytorch_tabnet.tab_model import TabNetClassifier
from sklearn.datasets import make_classification
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import train_test_split


def main() -> None:
    """Fit, save and test a classifier."""
    x, y = make_classification(
        20_000, 54, n_informative=20, n_redundant=10, n_classes=7, random_state=0
    )
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.2, random_state=0)
    x_train, x_valid, y_train, y_valid = train_test_split(
        x_train, y_train, test_size=0.2, random_state=0
    )
    classifier = TabNetClassifier(seed=int(sys.argv[1]), device_name="cpu")
    start_s = time.perf_counter()
    classifier.fit(
        x_train,
        y_train,
        eval_set=[(x_valid, y_valid)],
        eval_metric=["accuracy"],
        max_epochs=25,
        patience=25,
        batch_size=1024,
        virtual_batch_size=128,
    )
    print(f"fitted in {time.perf_counter() - start_s:.2f} s")
    classifier.save_model("tabnet")
    found = classifier.predict_proba(x_test)
    accuracy = accuracy_score(y_test, found.argmax(axis=1))
    print(f"test accuracy {accuracy:.4f}, log loss {log_loss(y_test, found):.4f}")


if __name__ == "__main__":
    main()
