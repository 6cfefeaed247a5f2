// SPDX-License-Identifier: Apache-2.0
// Shows the report on the Guidance Info node.
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
      widget.inputEl.placeholder = "The guidance report appears here after sampling.";
      widget.serialize = false; // do not save it in workflow files
      widget.options.serialize = false; // do not send it to the server
      this.report = widget;
      this.setSize([440, 240]);
    };

    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      this.report.value = output.text.join("\n");
    };
  },
});
