"""The colour of an object, by CLIP: GenEval's zero-shot classifier over its ten colours.

The object's mask is put on grey and cut out along its box; CLIP says which of ten descriptions is nearest. A
colour's description is the mean of three sentences' embeddings.
"""

import torch
import torch.nn.functional as F

from rewards.geneval.detection import COLORS

GREY = 153 / 255  # what pixels outside the mask become
SENTENCES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)


def cut_out(image, box, mask):
    """The object on grey. image (3, H, W) in [0, 1], box (x0, y0, x1, y1) in pixels, mask (H, W) bool ->
    (3, y1 - y0, x1 - x0)."""
    x0, y0, x1, y1 = box
    return torch.where(mask, image, GREY)[:, y0:y1, x0:x1]


class ColorClassifier:
    """classifier(image, box, mask, class_name) -> one of COLORS, see `cut_out` for the shapes.

    clip: a `rewards.clip.Clip`; GenEval's is OpenAI's ViT-L/14.
    """

    def __init__(self, clip):
        self.clip = clip
        self.cache = {}  # {class name: its descriptions}

    def descriptions(self, name):
        """(10, D), a row of length 1 for each colour of that class of objects."""
        if name not in self.cache:
            texts = []
            for color in COLORS:
                for sentence in SENTENCES:
                    texts.append(sentence.format(color=color, name=name))
            embeds = self.clip.text_embeds(texts).view(len(COLORS), len(SENTENCES), -1)
            self.cache[name] = F.normalize(embeds.mean(dim=1), dim=1)
        return self.cache[name]

    def __call__(self, image, box, mask, name):
        embed = self.clip.image_embeds(cut_out(image, box, mask)[None])[0]
        similarity = self.descriptions(name) @ embed  # (10,)
        return COLORS[int(similarity.argmax())]
