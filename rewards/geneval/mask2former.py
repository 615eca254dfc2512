"""GenEval's detector for real images: Mask2Former over COCO's 80 classes, with transformers alone.

GenEval's own code runs mmdet's Mask2Former; the steps here are those of mmdet's test pipeline:
  before  resize to a short side of 800 (a long side of at most 1333), ImageNet's mean and deviation, zeros at
          the right and the bottom up to a multiple of 32
  after   mask logits upsampled to the padded input, cropped, resized to the image; the 100 most probable
          pairs of query and class; score = class probability * mean mask probability over the mask's pixels
  kept    scores above 0.3, above 0.9 for counting prompts
transformers' own image processor does both differently: it stretches to a multiple of 32 instead of
padding, and makes masks of 384 x 384. The resize is antialiased, as there; mmdet's is not, which shows for
images above 800 pixels.

The default weights are not mmdet's but come from another training run: scores near 0.9 differ, and with them
counts. None of their numbers is "GenEval" before it was compared with the official code's on the same images.
"""

from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Mask2FormerModel, Mask2FormerPreTrainedModel

from rewards.errors import BadInput
from rewards.geneval.detection import CLASSES, MAX_OBJECTS, Detection, place_of
from rewards.geneval.rule import asked_color
from rewards.weights import from_hub

SHORT_SIDE = 800  # pixels of the detector's input
LONG_SIDE = 1333
DIVISOR = 32
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
THRESHOLD = 0.3  # a score counts when it is above, not at, the threshold
COUNTING_THRESHOLD = 0.9
MAX_INSTANCES = 100  # pairs of query and class that are looked at


class Mask2Former(Mask2FormerPreTrainedModel):
    """Mask2FormerForUniversalSegmentation without its training loss, the only part that needs scipy.

    The weights have the same names. forward(pixels (B, 3, H, W)) -> class logits (B, Q, classes + 1), the
    last class being "no object", and mask logits (B, Q, H / 4, W / 4).
    """

    # the loss's weights; an index that Swin computes by itself; a norm that Swin's backbone doesn't use
    _keys_to_ignore_on_load_unexpected = [r"^criterion\.empty_weight$", r"\.relative_position_index$"]
    _keys_to_ignore_on_load_missing = [r"\.encoder\.swin\.layernorm\.(weight|bias)$"]

    def __init__(self, config):
        super().__init__(config)
        self.model = Mask2FormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.post_init()

    def forward(self, pixels):
        # No pixel_mask: the model takes one but ignores it, and mmdet's, too, treats the padding as image.
        output = self.model(pixels, output_hidden_states=True)
        # (Q, B, D) after the decoder's last norm, which transformer_decoder_last_hidden_state lacks
        queries = output.transformer_decoder_intermediate_states[-1]
        return self.class_predictor(queries.transpose(0, 1)), output.masks_queries_logits[-1]


def preprocess(images):
    """images (B, 3, H, W) in [0, 1] -> normalised (B, 3, H', W') with H', W' multiples of 32, and the size
    (h, w) of its part that is image; the rest, at the right and the bottom, is zero."""
    height, width = images.shape[-2:]
    scale = min(SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width))
    h = int(height * scale + 0.5)
    w = int(width * scale + 0.5)
    # 8 bits before and after the resize: the detector was trained on, and GenEval reads, saved pictures
    images = (images.float() * 255).round()
    images = F.interpolate(images, (h, w), mode="bilinear", antialias=True)
    images = images.round() / 255
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    padding = (0, -w % DIVISOR, 0, -h % DIVISOR)
    return F.pad((images - mean) / std, padding), (h, w)


def find_instances(class_logits, mask_logits, padded, resized, original, threshold):
    """The objects of one image whose score is above the threshold, best first.

    class_logits (Q, classes + 1), mask_logits (Q, h, w); the sizes (height, width) are of the model's input,
    of its part that is image, and of the image itself. Returns scores (N,), classes (N,) int64, boxes (N, 4)
    int64 as x0, y0, x1, y1 in the image's pixels with x1, y1 exclusive, masks (N, H, W) bool.
    """
    num_classes = class_logits.shape[1] - 1
    probability = class_logits.softmax(dim=1)[:, :-1].flatten()
    probability, index = probability.topk(min(MAX_INSTANCES, len(probability)))
    likely = probability > threshold  # no score is above its probability: the other masks need not be made
    probability = probability[likely]
    index = index[likely]
    logits = mask_logits.new_zeros((0,) + tuple(original))
    if len(index) > 0:  # interpolate takes no empty batch
        logits = mask_logits[index // num_classes][None]
        logits = F.interpolate(logits, padded, mode="bilinear")
        logits = logits[..., : resized[0], : resized[1]]
        logits = F.interpolate(logits, original, mode="bilinear")[0]
    masks = logits > 0  # (N, H, W)
    area = masks.sum(dim=(1, 2)).clamp(min=1)  # an empty mask scores 0
    inside = logits.sigmoid() * masks
    scores = probability * inside.sum(dim=(1, 2)) / area
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] > threshold]
    classes = index[order] % num_classes
    return scores[order], classes, mask_boxes(masks[order]), masks[order]


def mask_boxes(masks):
    """The boxes of masks (N, H, W): (N, 4) int64 as x0, y0, x1, y1, with x1, y1 exclusive."""
    x0, x1 = first_and_end(masks.any(dim=1))
    y0, y1 = first_and_end(masks.any(dim=2))
    return torch.stack([x0, y0, x1, y1], dim=1)


def first_and_end(filled):
    """Per row of filled (N, L) bool, the index of the first True, and one more than that of the last."""
    first = filled.int().argmax(dim=1)
    end = filled.shape[1] - filled.flip(1).int().argmax(dim=1)
    return first, end


class Detector:
    """detector(images (B, 3, H, W) in [0, 1], metadata) -> per image a list of `Detection`, or None where the
    model's output is not finite.

    model: a `Mask2Former` of the 80 classes. colors: a `ColorClassifier`, needed when a row asks for a
    colour; only objects of the classes that are asked for with one get one. batch_size: images per forward
    pass, which sets memory and speed.
    """

    def __init__(self, model, colors=None, batch_size=8):
        self.model = model.eval().requires_grad_(False)
        self.colors = colors
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, images, metadata):
        found = []
        for chunk in images.split(self.batch_size):
            chunk = chunk.to(self.model.device, torch.float32)
            pixels, resized = preprocess(chunk)
            class_logits, mask_logits = self.model(pixels)
            padded = pixels.shape[-2:]
            original = chunk.shape[-2:]
            for k, image in enumerate(chunk):
                row = metadata[len(found)]
                threshold = THRESHOLD
                if row.get("tag") == "counting":
                    threshold = COUNTING_THRESHOLD
                finite = class_logits[k].isfinite().all() and mask_logits[k].isfinite().all()
                if not finite:
                    found.append(None)
                    continue
                instances = find_instances(
                    class_logits[k], mask_logits[k], padded, resized, original, threshold
                )
                found.append(self.describe(image, row, instances))
        return found

    def describe(self, image, metadata, instances):
        """The `Detection`s of one image, best first; the scorer takes at most MAX_OBJECTS of a class.

        instances: as from `find_instances`.
        """
        asked = {clause["class"] for clause in metadata["include"] if asked_color(clause) is not None}
        height, width = image.shape[-2:]
        detections = []
        counts = Counter()
        scores, classes, boxes, masks = instances
        for n, label in enumerate(classes.tolist()):
            name = CLASSES[label]
            box = boxes[n].tolist()
            counts[name] += 1
            if counts[name] > MAX_OBJECTS:
                continue
            color = None
            if name in asked:
                color = self.colors(image, box, masks[n], name)
            place = place_of(box, width, height)
            detections.append(Detection(name, tuple(box), scores[n].item(), color, place))
        return detections


def check_labels(config, name):
    """Raises BadInput unless the classes are COCO's 80 in COCO's order: they are matched by their number."""
    labels = [config.id2label[i] for i in range(config.num_labels)]
    same = 0
    for label, known in zip(labels, CLASSES):
        # by the last word, "mouse" of "computer mouse"; a few may differ, as "sofa" and "couch" do
        if label.split()[-1:] == known.split()[-1:]:
            same += 1
    if len(labels) != len(CLASSES) or same < 70:
        raise BadInput(
            f"{name} has {len(labels)} labels ({', '.join(labels[:3])}, ...), not COCO's 80 in COCO's order"
        )


def load_detector(name, device, asks_colors):
    """The detector with the weights of a hub id or a folder, and with CLIP where a row asks for a colour.

    float32 on every device: bfloat16 rounds the attention's sampling points to several pixels. Raises
    BadInput when the weights are missing or not such a model's.
    """
    model, info = from_hub(Mask2Former.from_pretrained, name, dtype=torch.float32, output_loading_info=True)
    wrong = sorted(set(info["missing_keys"]) | set(info["unexpected_keys"]))
    if wrong:
        raise BadInput(
            f"{name} is no Mask2Former: {len(wrong)} weights missing or unknown, such as {wrong[0]}"
        )
    check_labels(model.config, name)
    colors = None
    if asks_colors:
        from rewards.clip import load_clip
        from rewards.geneval.colors import ColorClassifier

        colors = ColorClassifier(load_clip("openai/clip-vit-large-patch14", device))
    return Detector(model.to(device), colors)
