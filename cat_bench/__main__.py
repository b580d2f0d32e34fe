"""python -m cat_bench: the same as the console script cat-bench."""

from cat_bench.cli import main

if __name__ == "__main__":
    main()
