"""A page of Gradio in ten lines: pip install gradio; python docs/gradio_app.py runs/toy/stage3"""

import sys

import gradio as gr

from xsam.model import XSAM

model = XSAM.from_pretrained(sys.argv[1])


def segment(image, phrase):
    result = model.predict(image, "refer", phrase)
    return result.image, list(zip(result.masks.astype(float), result.labels, strict=True))


gr.Interface(segment, [gr.Image(type="pil"), "text"], gr.AnnotatedImage()).launch()
