"""What GenEval's rule and its detectors share: a detection, and the benchmark's words. Imports nothing."""

from typing import NamedTuple


class Detection(NamedTuple):
    """An object that a detector found in an image."""

    class_name: str
    box: tuple  # in pixels: x0, y0, x1, y1
    score: float
    color: str | None
    place: str | None = None  # the ninth of the image that its centre is in: one of PLACES


TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
CLASSES = tuple(  # COCO's 80 in its order and GenEval's words: computer mouse, tv remote, computer keyboard
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,"
    "tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,"
    "tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,"
    "hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,computer mouse,"
    "tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,"
    "scissors,teddy bear,hair drier,toothbrush".split(",")
)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
PLACES = (  # the ninths of an image, row by row
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
MAX_OBJECTS = 16  # detections kept per class, best score first


def place_of(box, width, height):
    """The name of the ninth of an image of width x height pixels that the centre of a box is in."""
    x0, y0, x1, y1 = box
    column = int((x0 + x1) / 2 * 3 / width)
    row = int((y0 + y1) / 2 * 3 / height)
    return PLACES[min(row, 2)][min(column, 2)]
