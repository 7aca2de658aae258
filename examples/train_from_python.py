"""Train a recipe from Python, and measure the accuracy of its nearest neighbors.

python examples/train_from_python.py zprob_vicreg data.train=data/photos data.val=data/photos train.epochs=20
"""

import argparse

from fastssl import load_recipe
from fastssl.evaluation import evaluate_knn, find_evaluation_data, load_run_encoder
from fastssl.training import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file, or name of a recipe of `fastssl recipes ls`")
    parser.add_argument("overrides", nargs="*", help="keys to change, such as train.epochs=20")
    options = parser.parse_args()
    run_dir = train(load_recipe(options.recipe, options.overrides))
    encoder = load_run_encoder(run_dir)
    result = evaluate_knn(encoder, find_evaluation_data(encoder))
    print(f"{run_dir}: {result['metrics']['accuracy_k20_t0.07']:.1%} of the test images are classified correctly.")


if __name__ == "__main__":
    main()
