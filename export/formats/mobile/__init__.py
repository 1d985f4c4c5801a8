"""Formats for phones and boards, each written by a converter of its own: ncnn, Core ML, Qualcomm's QNN."""
