# SPDX-License-Identifier: Apache-2.0
"""Style sheet of the page."""

STYLE = """
.gradio-container { max-width: min(1400px, 100%) !important; margin: 0 auto; padding: 10px 16px !important; }
.gradio-container main { padding: 0 !important; }
.gradio-container .fillable { padding: 0 !important; }
#heading h1 { font-size: 1.3rem; margin: 0; }
#heading p { margin: 0; color: var(--body-text-color-subdued); }
.gradio-container :is(button, a, input[type=range]):focus-visible { outline: 3px solid var(--color-accent);
  outline-offset: 2px; }
.gradio-container .gallery-item:focus-visible { outline-offset: -3px; }
.words, .words .html-container { padding: 0 !important; }
#main, #left, #right, #history { min-width: 0 !important; max-width: 100%; }
#right { scroll-margin-top: 10px; }
#examples .gallery-item { max-width: 100%; text-align: left; }
#examples .label svg, #presets .label svg, #history .label svg { display: none; }

#message p, #model-message p { margin: 0; padding: 9px 12px; border-radius: 6px; overflow-wrap: anywhere;
  line-height: 1.35; background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary); }
:is(#message, #model-message) p.refused { border-color: #c2410c; border-left-width: 5px; }
#message progress { appearance: none; display: block; width: 100%; height: 8px; margin-top: 6px; border: 0;
  border-radius: 4px; overflow: hidden; background: var(--border-color-primary); }
#message progress::-webkit-progress-bar { background: var(--border-color-primary); }
#message progress::-webkit-progress-value { background: var(--color-accent); }
#message progress::-moz-progress-bar { background: var(--color-accent); }

.gradio-container figure { margin: 0 !important; min-width: 0; }
.gradio-container figure img { display: block; width: 100%; height: 100%; margin: 0; border-radius: 4px; }
.gradio-container figure.small img { image-rendering: pixelated; }
.gradio-container figcaption { margin: 2px 0 6px; color: var(--body-text-color); font-size: 0.95rem; }
.gradio-container .frame { display: block; position: relative; margin: 0 auto; padding: 0 !important; }
.gradio-container .frame.empty { border: 1px dashed var(--border-color-primary); border-radius: 4px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; align-items: end; }
.ends { display: flex; justify-content: space-between; gap: 12px; }
.ends :last-child { text-align: right; }
.divided .after { position: absolute; inset: 0; clip-path: inset(0 0 0 var(--at)); }
.divided::after { content: ""; position: absolute; inset: 0 auto 0 calc(var(--at) - 1px); width: 2px;
  background: white; box-shadow: 0 0 3px black; pointer-events: none; }
.divided input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: ew-resize;
  touch-action: pan-y; }
.divided:focus-within { outline: 3px solid var(--color-accent); outline-offset: 2px; }
.divided .handle { position: absolute; top: 50%; left: var(--at); transform: translate(-50%, -50%); padding: 4px 8px;
  border-radius: 6px; background: var(--color-accent); color: white; pointer-events: none; }
.downloads a { padding: 0 !important; }
.downloads { display: flex; flex-wrap: wrap; gap: 4px 16px; margin-top: 8px; font-size: 0.92rem; }

#history .gallery-item { flex: 0 0 150px; display: flex; align-items: flex-start; align-self: stretch; padding: 6px; }
#history .gallery { text-align: left; font-size: 0.85rem; line-height: 1.35; }
#history > .gallery { display: flex; flex-wrap: nowrap; overflow-x: auto; padding: 3px; gap: 8px; }
#history .gallery-item img { display: block; height: 84px; margin: 0 0 4px; border-radius: 3px; }
#history .gallery-item b, #history .gallery-item small { display: block; font-size: 0.85rem; overflow-wrap: anywhere; }

#sigma-slider .tab-like-container, #sigma-slider .min_value, #sigma-slider .max_value { display: none; }
table.words, table.words tr { border: 0 !important; }
table.words { border-collapse: collapse; width: 100%; font-size: 0.92rem; margin: 4px 0 10px; }
table.words caption { text-align: left; font-weight: 600; padding: 6px 0; }
table.words th, table.words td { text-align: left; padding: 4px 10px 4px 0 !important; overflow-wrap: anywhere;
  border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important; }
table.words th { color: var(--body-text-color-subdued); font-weight: 600; overflow-wrap: normal; }
@media (max-width: 760px) {
  #main { flex-direction: column; }
  #left, #right { width: 100%; flex: none !important; }
  .gradio-container figcaption { font-size: 0.85rem; }
}
"""
