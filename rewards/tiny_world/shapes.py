"""The tiny world's detector: finds circles, squares, triangles and crosses, from first principles.

Foreground = far from the background colour; objects = connected components; shape = best overlap with a
template stretched over the component's box; colour = nearest palette entry. Batched torch, about a
millisecond an image. The palette and the geometry are defined here, once; `tiny/world.py` draws with them, so
drawing and detecting agree.
"""

import torch
import torch.nn.functional as F
from einops import rearrange

from rewards.geneval.detection import Detection

CLASSES = ("circle", "square", "triangle", "cross")
BACKGROUND = (16, 16, 28)
PALETTE = {
    "red": (230, 50, 50),
    "green": (50, 200, 70),
    "blue": (60, 100, 245),
    "yellow": (240, 220, 50),
    "purple": (190, 70, 230),
    "white": (240, 240, 240),
}
FOREGROUND_DISTANCE = (
    0.28  # RGB distance to the background, colours in [0, 1]; an edge pixel counts from about half
)
MIN_AREA = 24  # pixels: smaller specks are decoder noise; the smallest object drawn covers about 70
MIN_OVERLAP = 0.65  # intersection over union with the best template; below it the component is "no shape"
MAX_SIZE = 0.5  # of the image's width: a filled image is no square; the largest object drawn takes 0.31
MAX_ASPECT = 1.35  # every class fills a square box, so a stretched component is none of them
GRID = 24  # templates are compared on GRID x GRID points of the component's box


def inside(shape, u, v):
    """Signed distance to the shape's edge, positive inside; u, v in half-sizes, v pointing down."""
    if shape == "circle":
        return 1 - (u**2 + v**2) ** 0.5
    if shape == "square":
        return 1 - torch.maximum(u.abs(), v.abs())
    if shape == "triangle":  # apex up, as wide as it is high
        return torch.minimum(1 - v, ((v + 1) / 2 - u.abs()) / 1.25**0.5)
    if shape == "cross":
        arm = 0.36
        return torch.maximum(
            torch.minimum(1 - u.abs(), arm - v.abs()), torch.minimum(arm - u.abs(), 1 - v.abs())
        )
    raise ValueError(f"unknown shape {shape!r}, expected one of {CLASSES}")


def connected_components(mask):
    """Labels 8-connected components. mask (B, H, W) bool -> (B, H, W) int64, 0 outside, ids unique over the
    batch.

    Each pixel takes the largest id among its neighbours until nothing changes; ids start as pixel numbers.
    """
    ids = torch.arange(1, mask.numel() + 1, device=mask.device).view_as(mask) * mask
    while True:
        wide = F.pad(ids, (1, 1))  # the largest of three neighbours in a row, then of three rows
        grown = torch.maximum(torch.maximum(wide[:, :, :-2], wide[:, :, 2:]), ids)
        tall = F.pad(grown, (0, 0, 1, 1))
        grown = torch.maximum(torch.maximum(tall[:, :-2], tall[:, 2:]), grown) * mask
        if torch.equal(grown, ids):
            return ids
        ids = grown


def measure_components(mask, min_area):
    """Boxes of the connected components of a batch of masks.

    mask (B, H, W) bool. Returns labels (B, H, W) int64 (0 = none, n + 1 = component n), owner (N,) the image
    each component is in, box (N, 4) as x0, y0, x1, y1 with x1, y1 exclusive. Components under min_area pixels
    are dropped.
    """
    B, H, W = mask.shape
    ids = connected_components(mask)
    b, y, x = torch.nonzero(mask, as_tuple=True)  # only foreground pixels from here on: a few percent of all
    _, index, area = ids[b, y, x].unique(return_inverse=True, return_counts=True)
    keep = area >= min_area
    number = (torch.cumsum(keep, 0) * keep)[index]  # of each pixel's component, from 1; 0 where it is dropped
    labels = torch.zeros_like(ids)
    labels[b, y, x] = number
    N, points = int(keep.sum()), torch.stack([x, y, b], dim=1)[number > 0]
    index = (number[number > 0] - 1)[:, None].expand(-1, 3)
    low, high = points.new_full((N, 3), H + W + B), points.new_zeros((N, 3))
    low, high = low.scatter_reduce(0, index, points, "amin"), high.scatter_reduce(0, index, points, "amax")
    return labels, low[:, 2], torch.cat([low[:, :2], high[:, :2] + 1], dim=1)


def crop_to_grid(labels, owner, box, grid_h, grid_w):
    """Samples each component's mask on a grid stretched over its box: (N, grid_h, grid_w) bool."""
    v = (torch.arange(grid_h, device=box.device) + 0.5) / grid_h
    u = (torch.arange(grid_w, device=box.device) + 0.5) / grid_w
    y = (box[:, 1, None] + v * (box[:, 3] - box[:, 1])[:, None]).long()  # (N, grid_h)
    x = (box[:, 0, None] + u * (box[:, 2] - box[:, 0])[:, None]).long()  # (N, grid_w)
    number = torch.arange(1, len(box) + 1, device=box.device)
    return labels[owner[:, None, None], y[:, :, None], x[:, None, :]] == number[:, None, None]


def overlap(masks, templates):
    """Intersection over union of masks (N, ...) and templates (M, ...), both bool: (N, M)."""
    a, b = masks.flatten(1).float(), templates.flatten(1).float()
    intersection = a @ b.T
    return intersection / (a.sum(1)[:, None] + b.sum(1)[None] - intersection)


@torch.no_grad()
def detect(images):
    """Objects of each image. images (B, 3, H, W) float in [0, 1] -> one list of `Detection` an image.

    Boxes are in pixels, `score` is the template overlap, `color` a palette name. A component that is no shape
    (a bar, a thin blob, objects that touch) is left out; a compact blob may still pass as its nearest shape.
    """
    images = images.float()
    background = torch.tensor(BACKGROUND, device=images.device) / 255
    mask = (images - background.view(1, 3, 1, 1)).norm(dim=1) > FOREGROUND_DISTANCE  # (B, H, W)
    detections = [[] for _ in images]
    labels, owner, box = measure_components(mask, MIN_AREA)
    if len(box) == 0:
        return detections

    line = ((torch.arange(GRID, device=images.device) + 0.5) / GRID) * 2 - 1
    v, u = torch.meshgrid(line, line, indexing="ij")
    templates = torch.stack([inside(shape, u, v) >= 0 for shape in CLASSES])
    score, shape = overlap(crop_to_grid(labels, owner, box, GRID, GRID), templates).max(dim=1)
    size = box[:, 2:] - box[:, :2]
    longest, shortest = size.max(1).values, size.min(1).values
    is_shape = (
        (score >= MIN_OVERLAP) & (longest <= MAX_ASPECT * shortest) & (longest <= MAX_SIZE * images.shape[3])
    )

    # the mean colour over the component's interior: its edge pixels are mixed with the background
    interior = -F.max_pool2d(-mask[:, None].float(), 3, 1, 1)[:, 0] > 0
    weight = (labels > 0) * (interior + 1e-3)  # the edge still counts where a thin shape has no interior
    pixels = rearrange(images, "b c h w -> (b h w) c") * weight.reshape(-1, 1)
    total = torch.zeros(len(box) + 1, 4, device=images.device)
    total.index_add_(0, labels.reshape(-1), torch.cat([pixels, weight.reshape(-1, 1)], dim=1))
    mean = total[1:, :3] / total[1:, 3:]
    palette = torch.tensor(list(PALETTE.values()), device=images.device) / 255
    color = torch.cdist(mean, palette).argmin(dim=1)

    names = list(PALETTE)
    rows = zip(
        owner.tolist(), shape.tolist(), color.tolist(), score.tolist(), box.tolist(), is_shape.tolist()
    )
    for b, s, c, quality, corners, ok in rows:
        if ok:
            detections[b].append(Detection(CLASSES[s], tuple(corners), quality, names[c]))
    return detections
