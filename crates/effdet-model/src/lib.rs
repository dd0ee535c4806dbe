//! The EfficientDet family as data: presets, layers, variables, anchors, boxes, assignment, losses, decoding and NMS.
#![forbid(unsafe_code)]
