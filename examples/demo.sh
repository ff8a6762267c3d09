#!/bin/sh
# The main job, end to end, on this machine: cost, plan, run, prediction next to measurement, report.
set -eu
CDPATH= cd -- "$(dirname -- "$0")/.."

echo "1/5 What ViT-base/16 costs"
translution estimate vit-base/16 --precision fp32

echo
echo "2/5 A plan for handwritten digits on this machine, 2 CPU ranks"
translution plan examples/digits.yaml --cluster cpu:2 --stage 3 --offload none --micro-batch 32 --steps 200 --warmup-steps 20 \
    --learning-rate 3e-3 --out demo/plan --force

echo
echo "3/5 Training it with DeepSpeed ZeRO-3 on 2 ranks"
translution launch demo/plan

echo
echo "4/5 Predicted against measured memory per rank"
translution verify demo/plan

echo
echo "5/5 A page with the memory of a step"
translution report demo/plan --out demo/report.html --png demo/memory.png
