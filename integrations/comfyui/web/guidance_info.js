// SPDX-License-Identifier: Apache-2.0
// Shows the text of Guidance Info on the node.
import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

app.registerExtension({
  name: "segkern.GuidanceInfo",
  async beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== "GuidanceInfoSegkern") return;
    const { onNodeCreated, onExecuted } = nodeType.prototype;

    nodeType.prototype.onNodeCreated = function () {
      onNodeCreated?.apply(this, arguments);
      const { widget } = ComfyWidgets.STRING(this, "report", ["STRING", { multiline: true }], app);
      widget.inputEl.readOnly = true;
      widget.inputEl.placeholder = "What guidance did appears here after sampling.";
      widget.serialize = false; // neither in the workflow's file
      widget.options.serialize = false; // nor in what is sent to the server
      this.report = widget;
      this.setSize([440, 240]);
    };

    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      this.report.value = output.text.join("\n");
    };
  },
});
