// The search runs in a Web Worker, which browsers refuse to pages that are opened as files. There a hidden frame takes
// the place of the worker: it has a global scope of its own, and messages reach it as they reach a worker.
if (window.location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.frame.srcdoc = "<!doctype html><title>worker</title>"
      this.ready = new Promise((resolve) => {
        this.frame.addEventListener("load", () => {
          const scope = this.frame.contentWindow
          const load = (address) => new Promise((loaded, failed) => {
            const script = scope.document.createElement("script")
            script.src = address
            script.onload = loaded
            script.onerror = failed
            scope.document.head.append(script)
          })
          scope.postMessage = (data) => this.report(new MessageEvent("message", { data }))
          scope.importScripts = async (...addresses) => {
            for (const address of addresses) await load(address)
          }
          load(new URL(url, document.baseURI).href).then(() => resolve(scope), () => this.report(new ErrorEvent("error", { message: url })))
        }, { once: true })
      })
      const attach = () => document.body.append(this.frame)
      if (document.body) attach()
      else document.addEventListener("DOMContentLoaded", attach)
    }
    postMessage(data) {
      this.ready.then((scope) => scope.dispatchEvent(new MessageEvent("message", { data })))
    }
    report(event) {
      this.dispatchEvent(event)
      this[`on${event.type}`]?.(event)
    }
    terminate() {
      this.frame.remove()
    }
  }
}
