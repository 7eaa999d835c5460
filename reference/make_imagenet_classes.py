"""Writes fixtures/imagenet-classes.txt: the 1000 classes of ILSVRC-2012 in the order of published classifiers, one per line: WordNet's
number and its first name (the first two where two classes share the first one; the bird and the machine are both just `crane`).

    python3 reference/make_imagenet_classes.py     # needs timm
"""

import collections
import pathlib

from timm.data import ImageNetInfo


def main():
    info = ImageNetInfo("imagenet-1k")
    lemmas = [[name.strip() for name in text.split(",")] for text in info.label_descriptions()]
    first = collections.Counter(names[0] for names in lemmas)
    names = [", ".join(names[:2]) if first[names[0]] > 1 else names[0] for names in lemmas]
    lines = [f"{synset} {name}\n" for synset, name in zip(info.label_names(), names)]
    (pathlib.Path(__file__).parent.parent / "fixtures/imagenet-classes.txt").write_text("".join(lines))


if __name__ == "__main__":
    main()
